"""Any parts of any shapes make deltas or an error in one line that names the layer."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from impasto.core.errors import UserError
from impasto.formats.kohya import SUFFIXES
from impasto.formats.parts import FORMS, deltas_of, held, parts_of

LAYER = "unet.conv_in"
BESIDE = ("alpha", "magnitude", "dense.bias")
SHAPES = st.one_of(st.just((2, 2)), st.sampled_from([(2, 2, 2, 2), (2, 2, 1, 1), (1,), ()]),
                   st.lists(st.sampled_from([1, 2, 4]), max_size=4).map(tuple))
FORM = st.sampled_from([tuple(f"{kind}.{name}" for name in form) for kind, forms in FORMS.items() for form in forms] +
                       [("dense.weight",), ("dense.weight", "magnitude"), ("dense.bias",)])
PARTS = st.one_of(FORM, st.lists(st.sampled_from(sorted(SUFFIXES)), min_size=1, max_size=6, unique=True)).flatmap(
    lambda names: st.fixed_dictionaries({name: SHAPES for name in names},
                                        optional={name: SHAPES for name in BESIDE if name not in names}))


@settings(max_examples=600, deadline=None)
@given(shapes=PARTS, kernel=st.sampled_from([(), (1, 1), (2, 2)]))
def test_any_parts(shapes: dict[str, tuple[int, ...]], kernel: tuple[int, ...]) -> None:
    parts = {name: torch.ones(shape) for name, shape in shapes.items()}
    try:
        deltas = deltas_of(LAYER, parts, "a.safetensors", kernel)
    except UserError as error:
        assert "\n" not in str(error) and LAYER in str(error) and "a.safetensors" in str(error)
        return
    for delta in deltas:
        W = torch.ones(delta.shape) if delta.shape else None
        assert delta.weight(W).shape == delta.shape
    content = held(LAYER, deltas, "a.safetensors")
    again = deltas_of(LAYER, parts_of(LAYER, content, "a.safetensors"), "a.safetensors", kernel)
    for one, other in zip(deltas, again, strict=True):
        assert one.shape == other.shape and one.kind == other.kind
