"""New tokens against transformers' own encoder with a table that was made larger."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.data.cache import text_encoder_key
from impasto.deltas.adapter import Adapter
from impasto.deltas.lowrank import LowRank
from impasto.families.apply import apply
from impasto.families.clip import chunks_of
from impasto.families.sd1 import SD1
from tests.families.conftest import random_sd1
from tests.heard import Heard

CAT, NAME = "<sks-cat>", "text_encoder"


def vectors(n: int, seed: int = 0, width: int = 32) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * 0.05


def added(base: SD1, n: int = 3, token: str = CAT, seed: int = 0) -> Tensor:
    values = vectors(n, seed)
    base.tokens.add({token: {NAME: values}})
    return values


def ids_of(base: SD1, text: str) -> list[int]:
    return base.tokenizer(text, add_special_tokens=False).input_ids


def theirs(base: SD1, rows: list[list[int]], new: Tensor) -> Tensor:
    """States of ids without marks, from 49408 on for `new`, by transformers with the table enlarged."""
    encoder: Any = copy.deepcopy(base.text_encoder.text_model)
    size = encoder.config.vocab_size
    encoder.resize_token_embeddings(size + len(new), mean_resizing=False)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[size:] = new
        padded = [[49406, *row, 49407, *[49407] * (75 - len(row))] for row in rows]
        return encoder(torch.tensor(padded)).last_hidden_state


def runs(base: SD1, text: str) -> list[list[int]]:
    words = base.tokens.of(NAME)
    assert words is not None
    return words.runs(text)


@torch.no_grad()
def test_states_are_those_of_an_enlarged_table() -> None:
    base = random_sd1()
    new = added(base)
    own = [49408, 49409, 49410]
    captions = [f"a photo of {CAT}, asleep", "a cat", f"{CAT} {CAT}"]
    rows = [[*ids_of(base, "a photo of"), *own, *ids_of(base, ", asleep")], ids_of(base, "a cat"), own + own]
    torch.testing.assert_close(base.encode_text(captions)["states"], theirs(base, rows, new), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_other_captions_and_the_base_itself_stay_bit_for_bit() -> None:
    base = random_sd1()
    table = base.text_encoder.text_model.embeddings.token_embedding.weight
    before, fingerprint, plain = table.clone(), base.fingerprint(), base.encode_text(["a cat", CAT])["states"]
    handle = base.tokens.add({CAT: {NAME: vectors(2)}})
    changed = base.encode_text(["a cat", CAT])["states"]
    assert torch.equal(changed[0], plain[0]) and not torch.equal(changed[1], plain[1])
    assert base.fingerprint() == fingerprint and torch.equal(table, before)
    assert not any("tokens" in name for name in base.text_encoder.state_dict())
    handle.enabled = False
    assert torch.equal(base.encode_text(["a cat", CAT])["states"], plain)
    handle.enabled = True
    assert torch.equal(base.encode_text(["a cat", CAT])["states"], changed)
    handle.detach()
    handle.detach()
    assert torch.equal(base.encode_text(["a cat", CAT])["states"], plain)


def test_names_are_found_as_the_tokenizer_reads_them() -> None:
    base = random_sd1()
    added(base, 2, "sks cat")
    cat, dog = [[49408, 49409]], [[i] for i in ids_of(base, "dog")]
    for text in ("sks cat", "SKS  Cat", " sks\ncat "):
        assert runs(base, text) == cat
    assert runs(base, "dog sks cat dog") == dog + cat + dog
    assert runs(base, "sks dog") == [[i] for i in ids_of(base, "sks dog")]
    assert runs(base, "sks catalogue") == [[i] for i in ids_of(base, "sks catalogue")]


@pytest.mark.parametrize("text", ["<cat>, dog", "(<cat>) dog", "<CAT>.dog", "<cat><cat>"])
def test_signs_that_touch_a_name_do_not_hide_it(text: str) -> None:
    base = random_sd1()
    assert ids_of(base, "<cat>") != ids_of(base, text)[:len(ids_of(base, "<cat>"))] or text == "<CAT>.dog"
    added(base, 1, "<cat>")
    assert runs(base, text).count([49408]) == text.lower().count("<cat>")


def test_the_longest_name_comes_first() -> None:
    base = random_sd1()
    base.tokens.add({"sks": {NAME: vectors(1)}, "sks cat v2": {NAME: vectors(2)}, "sks cat": {NAME: vectors(1)}})
    sks, second, cat = [49408], [49409, 49410], [49411]
    assert runs(base, "sks cat v2 sks sks cat") == [second, sks, cat]
    words = base.tokens.of(NAME)
    assert words is not None and words.within("sks cat and sks") == {"sks", "sks cat"}


@torch.no_grad()
def test_a_token_is_weighed_with_all_of_its_vectors() -> None:
    base = random_sd1()
    base.text_encoder.text_model.final_layer_norm.bias.data.fill_(0.5)  # so that states have a mean
    added(base, 2)
    plain = base.encode_text([[("a ", 1.0), (CAT, 1.0)]])["states"]
    expected = plain.clone()
    expected[:, 2:4] *= 1.5
    weighed = base.encode_text([[("a ", 1.0), (CAT, 1.5)]])["states"]
    torch.testing.assert_close(weighed, expected * plain.mean() / expected.mean(), rtol=1e-5, atol=1e-5)


def test_chunks_never_split_a_token() -> None:
    """75 ids in a chunk; a token that does not fit begins the next one."""
    base = random_sd1()
    added(base, 4)
    words = base.tokens.of(NAME)
    (dog,) = ids_of(base, "dog")
    for before, sizes in ((71, [75]), (72, [72, 4]), (75, [75, 4])):
        chunks = chunks_of("dog " * before + CAT, base.tokenizer, 77, words)
        bodies = [[token for token, _ in chunk if token not in (49406, 49407)] for chunk in chunks]
        assert [len(body) for body in bodies] == sizes and bodies[-1][-4:] == [49408, 49409, 49410, 49411]
        assert all(len(chunk) == 77 and chunk[0][0] == 49406 for chunk in chunks)
        assert [token for body in bodies for token in body][:before] == [dog] * before


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("skip", [0, 1])
def test_gradients_reach_the_vectors_alone(checkpointed: bool, skip: int) -> None:
    """Against finite differences, whether blocks are computed again or not; captions without the token give zeros."""
    base = random_sd1(clip_skip=skip)
    base.components[NAME].double()
    if checkpointed:
        base.checkpoint_gradients()
    values = torch.nn.Parameter(vectors(2).double())
    base.tokens.add({CAT: {NAME: values}})

    def value() -> Tensor:  # rows are held in fp32
        return base.encode_text([f"a {CAT}"])["states"].sin().sum()

    value().backward()
    assert values.grad is not None
    assert not any(p.grad is not None for p in base.text_encoder.parameters())
    step = torch.zeros_like(values)
    step[1, 5] = 2.0**-10
    with torch.no_grad():
        values += step
        up = value()
        values -= 2 * step
        down = value()
    assert abs((up - down) / 2**-9 - values.grad[1, 5]) < 1e-3 * abs(float(values.grad[1, 5]))
    values.grad = None
    base.encode_text(["a dog"])["states"].sum().backward()
    assert values.grad is not None and not values.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype) -> None:
    """Vectors are kept in fp32 and rounded when they are looked up, as the table was."""
    base, exact = random_sd1(), random_sd1()
    base.components[NAME].to(dtype)
    for one in (base, exact):
        added(one)
    found, wanted = (one.encode_text([f"a {CAT}"])["states"] for one in (base, exact))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)


def test_cache_keys_tell_tokens_apart() -> None:
    base = random_sd1()
    fingerprint = base.fingerprint()
    plain = text_encoder_key(base, fingerprint)
    keys = {plain}
    for token, n, seed in ((CAT, 1, 0), (CAT, 1, 1), (CAT, 2, 0), ("sks cat", 1, 0)):
        handle = base.tokens.add({token: {NAME: vectors(n, seed)}})
        keys.add(text_encoder_key(base, fingerprint))
        handle.detach()
    assert len(keys) == 5 and text_encoder_key(base, fingerprint) == plain


def test_a_later_token_of_the_same_name_comes_first() -> None:
    base = random_sd1()
    first, second = base.tokens.add({CAT: {NAME: vectors(1)}}), base.tokens.add({CAT: {NAME: vectors(2)}})
    words = base.tokens.of(NAME)
    assert words is not None and len(words.rows) == 2 and len(runs(base, CAT)[0]) == 2
    other = base.tokens.add({CAT.upper(): {NAME: vectors(3)}})
    assert len(runs(base, CAT)[0]) == 3
    other.detach()
    second.detach()
    words = base.tokens.of(NAME)
    assert words is not None and torch.equal(words.rows, vectors(1))
    first.enabled = False
    assert base.tokens.of(NAME) is None


@pytest.mark.parametrize(("embeddings", "said"), [
    ({CAT: {NAME: vectors(2, width=48)}}, "shape 2×48, and those of text_encoder are 32 wide"),
    ({CAT: {NAME: vectors(2)[0]}}, "shape 32, and"),
    ({CAT: {NAME: vectors(76)}}, "76 vectors, and text_encoder reads 75 at a time"),
    ({CAT: {"text_encoder_2": vectors(1)}}, "text_encoder_2, which this base does not have"),
    ({"  ": {NAME: vectors(1)}}, "no name for a token"),
])
def test_what_does_not_fit_changes_nothing(embeddings: dict[str, dict[str, Tensor]], said: str) -> None:
    base = random_sd1()
    with pytest.raises(UserError, match=said):
        base.tokens.add({"fine": {NAME: vectors(1)}, **embeddings})
    assert base.tokens.of(NAME) is None


@torch.no_grad()
def test_apply_takes_tokens_with_deltas_and_takes_both_off() -> None:
    base = random_sd1()
    path = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    delta = LowRank.from_factors(torch.randn(32, 2), torch.randn(2, 32))
    plain = base.encode_text([CAT])["states"]
    adapter = Adapter({path: (delta,)}, embeddings={CAT: {NAME: vectors(2)}}, base={NAME: "another"})
    report = Heard()
    with apply(base, Adapter({}, embeddings=adapter.embeddings, base=adapter.base), report=report) as applied:
        assert base.tokens.of(NAME) is not None and applied.enabled
        applied.enabled = False
        assert torch.equal(base.encode_text([CAT])["states"], plain)
    assert base.tokens.of(NAME) is None
    assert report.notes == ["the adapter was made on another checkpoint of sd1 (text_encoder)"]
    with apply(base, adapter, 0.5):
        assert not torch.equal(base.encode_text([CAT])["states"], plain)
    assert torch.equal(base.encode_text([CAT])["states"], plain)
    wrong = Adapter({"unet.nowhere": (delta,)}, embeddings=adapter.embeddings)
    with pytest.raises(UserError, match="nowhere"):
        apply(base, wrong)
    assert base.tokens.of(NAME) is None
