"""Text comes out in whole characters and without stop strings."""

import random

import pytest

from spikingbrain_serving.text import REPLACEMENT, Detokenizer, StopStrings

TEXTS = ["plain words", "naïve café", "鳥が飛ぶ", "🐦🐦 fox 🐦", "e\u0301 \u200d👩‍👩‍👧", "a\nb\t c  d "]


def pieces_of(tokenizer, tokens: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text_and_no_character_is_split(tokenizer, text):
    tokens = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_a_character_appears_with_its_last_token(tokenizer):
    tokens = tokenizer.encode("🐦")
    assert len(tokens) == 4
    assert pieces_of(tokenizer, tokens) == ["", "", "", "🐦", ""]


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_random_tokens_add_up_to_their_decoding(tokenizer, seed):
    tokens = random.Random(seed).choices(range(len(tokenizer)), k=60)
    decoded = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(tokenizer, tokens)) == decoded


def test_bytes_that_are_no_text_do_not_hold_back_what_follows_for_ever(tokenizer):
    (continuation,) = tokenizer.encode("🐦")[1:2]
    detokenizer = Detokenizer(tokenizer)
    shown = [detokenizer.add(continuation) for _ in range(100)]
    assert len("".join(shown)) >= 98


def test_special_tokens_have_no_text(tokenizer):
    (end,) = tokenizer.encode("<|im_end|>")
    assert "".join(pieces_of(tokenizer, [*tokenizer.encode("a"), end, *tokenizer.encode(" b")])) == "a b"


def test_text_before_a_stop_string_is_shown_and_nothing_after():
    stops = StopStrings(("END",))
    assert [stops.feed(piece) for piece in ("one E", "N", "D two")] == [("one ", None), ("", None), ("", "END")]


def test_what_does_not_become_a_stop_string_is_shown():
    stops = StopStrings(("END",))
    assert [stops.feed(piece)[0] for piece in ("E", "N", "N", "E")] == ["", "", "ENN", ""]
    assert stops.release() == "E"


def test_the_first_of_several_stop_strings_ends_the_text():
    assert StopStrings(("dog", "x ju")).feed("fox jumps over the dog") == ("fo", "x ju")


@pytest.mark.parametrize("cut", range(1, 8))
def test_overlapping_beginnings_of_a_stop_string_are_found(cut):
    stops = StopStrings(("aab",))
    first, none = stops.feed("xaaaabyz"[:cut])
    if none is None:
        second, found = stops.feed("xaaaabyz"[cut:])
        assert (first + second, found) == ("xaa", "aab")
    else:
        assert (first, none) == ("xaa", "aab")
