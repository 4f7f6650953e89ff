"""Parameter groups by name: what a method may train."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from harness.errors import unknown

# Sources: ESD (rohitgandikota/erasing@a2189e9) `train_method`, in diffusers' names. A UNet without text has plain
# attention over positions right below `attentions`, where the others keep whole transformer blocks.
_HEAD = ("time_embedding.", "conv_norm_out.", "conv_out.")
_PLAIN = re.compile(r"\.attentions\.\d+\.(group_norm|to_q|to_k|to_v|to_out)\.")
GROUPS: Mapping[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "unet": lambda name: name.startswith("unet."),
    "unet.xattn": lambda name: name.startswith("unet.") and ".attn2." in name,
    "unet.xattn_kv": lambda name: name.startswith("unet.") and (".attn2.to_k." in name or ".attn2.to_v." in name),
    "unet.selfattn": lambda name: name.startswith("unet.") and (".attn1." in name or _PLAIN.search(name) is not None),
    "unet.noxattn": lambda name: name.startswith("unet.") and ".attn2." not in name and not name.removeprefix("unet.").startswith(_HEAD),
}
ALIASES = {"x": "unet.xattn", "x-strict": "unet.xattn_kv", "u": "unet.noxattn", "f": "unet", "selfattn": "unet.selfattn"}


def group(name: str) -> Callable[[str], bool]:
    """The test for membership in a parameter group; `x`, `x-strict`, `u`, `f` are ESD's short names."""
    try:
        return GROUPS[ALIASES.get(name, name)]
    except KeyError:
        raise unknown("parameter group", name, [*GROUPS, *ALIASES]) from None
