"""What others released, under its own `model_type`, config keys and tensor names: one file each.

A family file defines `Config` (a `FamilyConfig`), `ForCausalLM` and `NAMES`: pairs (part of its tensor name, of ours),
applied when a checkpoint is loaded and reversed when it is saved; no pair may match what another one makes.
"""

from typing import Any

from ..config import SpikingBrainConfig


class FamilyConfig(SpikingBrainConfig):
    """A config that is read from and written with a family's own keys and used with ours."""

    @classmethod
    def from_family(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """Our keys for the family's."""
        raise NotImplementedError

    def to_family(self, keys: dict[str, Any]) -> dict[str, Any]:
        """The family's keys for ours; raises `InputError` for a model the family cannot express."""
        raise NotImplementedError

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From the keys in the family's config.json, or from our own."""
        ours = config_dict if "mixers" in config_dict else cls.from_family(dict(config_dict))
        return super().from_dict(ours, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What is written to config.json: the family's keys."""
        return self.to_family(super().to_diff_dict())
