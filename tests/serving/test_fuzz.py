"""Half a minute of requests that are nearly right; the soak goes on for ten."""

from .fuzz import fuzz
from .harness import serving

SECONDS = 30


def test_nonsense_is_a_4xx_and_the_server_stays_well(model_dir):
    with serving(model_dir, max_num_seqs=4, max_model_len=64) as served:
        statuses = fuzz(served.url, SECONDS)["statuses"]
        assert statuses["200"] > 20
        assert statuses["400"] > 20
        served.wait_until_idle()
        assert served.client.completions.create(model="tiny", prompt="a", max_tokens=3).usage.completion_tokens == 3
