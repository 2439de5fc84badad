"""Textual inversion: what the vectors begin as, what trains, what keeps them near the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from impasto.core.errors import UserError
from impasto.families.sd1 import SD1
from impasto.formats.adapters import save_adapter
from impasto.methods.lora import LoRA
from impasto.methods.textual_inversion import TextualInversion
from impasto.methods.token_values import spread
from impasto.training.recipe import make_recipe
from tests.families.conftest import random_sd1

ENCODER = "text_encoder"


def inversion(**options: Any) -> TextualInversion:
    if "tokens" not in options:
        options = {"token": "<cat>", **options}
    return TextualInversion(TextualInversion.Options.model_validate({"kind": "textual_inversion", **options}))


def prepared(seed: int = 0, **options: Any) -> tuple[SD1, TextualInversion, list[dict[str, Any]]]:
    base, method = random_sd1(), inversion(**options)
    return base, method, method.prepare(base, seed)


def table(base: SD1) -> Tensor:
    return base.text_encoder.text_model.embeddings.token_embedding.weight


def vectors(method: TextualInversion, token: str = "<cat>") -> Tensor:
    return method.trained[ENCODER][token].vectors


def ids(base: SD1, text: str) -> list[int]:
    return base.tokenizer(text, add_special_tokens=False).input_ids


# --- what they begin as ----------------------------------------------------------------------------------------


def test_words_are_spread_as_a1111_spreads_them() -> None:
    """vec[i] = embedded[i * len(embedded) // n], its create_embedding."""
    for n in (3, 4, 5, 8):
        base, method, _ = prepared(vectors=n, initial="bearded old man")
        words = table(base)[ids(base, "bearded old man")]
        assert torch.equal(vectors(method), torch.stack([words[i * 3 // n] for i in range(n)]))
        assert method.remarks() == []


def test_more_words_than_vectors_are_averaged_and_told() -> None:
    base, method, _ = prepared(vectors=2, initial="bearded old man")
    words = table(base)[ids(base, "bearded old man")]
    tail = words[1:].mean(0)
    expected = torch.stack([words[0], tail / tail.norm() * (words[1].norm() + words[2].norm()) / 2])
    torch.testing.assert_close(vectors(method).detach(), expected)
    assert method.remarks() == [
        "<cat>: 'bearded old man' is 3 tokens, and its 2 vectors begin as the mean of neighbours"]
    one = spread(torch.randn(7, 5), 1)
    assert one.shape == (1, 5)


def test_random_ones_lie_as_the_vocabulary_does() -> None:
    def drawn(token: str, seed: int) -> Tensor:
        method = inversion(token=token, vectors=75)
        method.prepare(base, seed)
        return vectors(method, token).detach()

    base = random_sd1()
    table(base)[:] = torch.randn(49408, 32) * torch.linspace(0.1, 1, 32) + torch.linspace(-1, 1, 32)
    many = torch.cat([drawn(f"<{i}>", i) for i in range(40)])
    deviation, mean = torch.std_mean(table(base), 0)
    torch.testing.assert_close(many.mean(0), mean, atol=0.06, rtol=0)
    torch.testing.assert_close(many.std(0), deviation, atol=0, rtol=0.06)
    assert abs(many.norm(dim=1).mean() / table(base).norm(dim=1).mean() - 1) < 0.02
    first = drawn("<a>", 3)
    assert not torch.equal(first, drawn("<b>", 3)) and not torch.equal(first, drawn("<c>", 4))
    values = table(base).clone()
    base = random_sd1()
    table(base)[:] = values
    assert torch.equal(first, drawn("<a>", 3))


def test_a_file_is_gone_on_with(tmp_path: Path) -> None:
    _, first, _ = prepared(vectors=3)
    path = tmp_path / "cat.safetensors"
    save_adapter(first.adapter(), path, format="webui-embedding", dtype=torch.float32)
    _, method, _ = prepared(token="<dog>", initial_file=str(path))
    assert torch.equal(vectors(method, "<dog>"), vectors(first))
    for options, said in (({"vectors": 2}, "holds 3 vectors, not 2"), ({"initial_file": "nowhere.pt"}, "nowhere.pt")):
        with pytest.raises(UserError, match=said):
            prepared(**{"initial_file": str(path), **options})
    narrow = tmp_path / "narrow.safetensors"
    save_adapter(type(first.adapter())({}, embeddings={"x": {ENCODER: torch.ones(1, 16)}}), narrow,
                 format="webui-embedding")
    with pytest.raises(UserError, match="no vectors of 32 channels"):
        prepared(initial_file=str(narrow))


# --- what trains ---------------------------------------------------------------------------------------------


def test_the_vectors_alone_train() -> None:
    """Gradient and optimizer state are of the new rows; the table is the same bit for bit after steps of AdamW."""
    base, method, groups = prepared(vectors=2, initial="cat")
    (group,) = groups
    assert group["name"] == "textual_inversion text_encoder" and group["paths"] == ["text_encoder.<cat>"]
    (parameter,) = group["params"]
    assert parameter is vectors(method) and parameter.shape == (2, 32) and parameter.dtype == torch.float32
    before, start = {n: p.clone() for n, p in base.text_encoder.named_parameters()}, parameter.detach().clone()
    optimizer = torch.optim.AdamW([{"params": group["params"]}], lr=1e-2)
    for _ in range(3):
        base.encode_text(["a <cat>"])["states"].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [tuple(s["exp_avg"].shape) for s in optimizer.state.values()] == [(2, 32)]
    assert not torch.equal(parameter, start)
    assert all(torch.equal(p, before[n]) for n, p in base.text_encoder.named_parameters())
    assert method.trains(base) == {ENCODER} and list(method.modules()) == ["text_encoder.<cat>"]
    assert torch.equal(method.adapter().embeddings["<cat>"][ENCODER], parameter)


def test_each_text_encoder_gets_vectors_of_its_own() -> None:
    """A family of two encoders of different widths; none such is registered yet."""
    base = TwoEncoders.made()
    method = inversion(vectors=2, initial="cat")
    groups = method.prepare(base, 0)
    assert [g["name"] for g in groups] == ["textual_inversion text_encoder", "textual_inversion text_encoder_2"]
    found = method.adapter().embeddings["<cat>"]
    assert {name: tuple(v.shape) for name, v in found.items()} == {ENCODER: (2, 32), "text_encoder_2": (2, 48)}
    penalty = method.penalty()
    assert penalty is not None and penalty.ndim == 0


class TwoEncoders(SD1):  # type: ignore[misc]
    """SD 1.x with a second, wider text encoder that nothing reads."""

    text_encoder_names = ("text_encoder", "text_encoder_2")

    @classmethod
    def made(cls) -> SD1:
        base = random_sd1()
        base.__class__ = cls
        base.components["text_encoder_2"] = torch.nn.Embedding(49408, 48)
        return base

    def vocabulary(self, encoder: str) -> Any:
        known = super().vocabulary(encoder)
        table = self.components["text_encoder_2"] if encoder == "text_encoder_2" else known.table
        return type(known)(known.ids, table, known.room)


def test_stop_rests_them() -> None:
    for stop, total, last in ((0.5, 7, 4), (0.25, 8, 2), (5, 8, 5), (1, 3, 1)):
        _, method, _ = prepared(stop=stop, project=True)
        method.begin(total)
        assert [step for step in range(total) if not list(method.resting(step))] == list(range(last))
    method.begin(4)
    vectors(method).data *= 3
    before = vectors(method).clone()
    method.after_step(4)
    assert torch.equal(vectors(method), before)


# --- what keeps them near ---------------------------------------------------------------------------------------


def test_the_penalty_is_the_closed_form() -> None:
    base, method, _ = prepared(tokens={"<cat>": {"vectors": 2}, "<dog>": {"vectors": 1}}, norm_penalty=0.3)
    own = torch.cat([vectors(method), vectors(method, "<dog>")]).double()
    gap = own.norm(dim=1).mean() - table(base).double().norm(dim=1).mean()
    penalty = method.penalty()
    assert penalty is not None
    torch.testing.assert_close(penalty.double(), 0.3 * gap**2)
    penalty.backward()
    grad = vectors(method).grad
    assert grad is not None
    torch.testing.assert_close(grad.double(), (0.3 * 2 * gap / 3 * own / own.norm(dim=1, keepdim=True))[:2].detach(),
                               rtol=1e-4, atol=1e-9)
    assert prepared(norm_penalty=0)[1].penalty() is None


def test_projection_is_to_the_vocabulary_s_mean_norm() -> None:
    base, method, _ = prepared(vectors=3, project=True)
    vectors(method).data *= torch.tensor([[0.1], [1.0], [7.0]])
    direction = torch.nn.functional.normalize(vectors(method).detach())
    method.after_step(0)
    torch.testing.assert_close(vectors(method).detach(), direction * table(base).norm(dim=1).mean())


# --- what is wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "said"), [
    ({"token": "cat"}, "'cat': is a word that text_encoder knows already.*choose another name, such as <cat-1>"),
    ({"token": "sks"}, "knows already"),
    ({"tokens": {"<cat>": {}, "<CAT>": {}}}, "is there twice: it reads as '<cat>' does"),
    ({"initial": " "}, "the tokenizer makes nothing of it"),
])
def test_names_and_words_that_cannot_be(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepared(**options)


def test_a_token_of_another_method_is_refused() -> None:
    base, _, _ = prepared()
    with pytest.raises(UserError, match="is there twice"):
        inversion().prepare(base, 0)


@pytest.mark.parametrize(("options", "said"), [
    ({}, "give token or tokens"),
    ({"token": "<a>", "tokens": {"<b>": {}}}, "not both"),
    ({"tokens": {"<b>": {}}, "vectors": 2}, "in tokens each has its own"),
    ({"token": "a.b"}, "cannot be a token"), ({"token": "(a)"}, "cannot be a token"), ({"token": ""}, "cannot be"),
    ({"token": "<a>", "vectors": 0}, "vectors"), ({"token": "<a>", "stop": 1.5}, "neither a whole number"),
    ({"token": "<a>", "initial": "x", "initial_file": "y"}, "give initial or initial_file, not both"),
    ({"tokens": {"<a>": {"initial": "x", "initial_file": "y"}}}, "give initial or initial_file, not both"),
    ({"tokens": {"<a>": {"vektors": 1}}}, "vektors"),
    ({"token": "<a>", "norm_penalty": float("inf")}, "finite"),
])
def test_recipes_that_say_two_things(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said) as raised:
        make_recipe({"base": {"path": "x"}, "method": {"kind": "textual_inversion", **options}})
    assert "\n" not in str(raised.value)


def test_captions_without_the_token_are_refused() -> None:
    _, method, _ = prepared(tokens={"<cat>": {}, "<dog>": {}})
    read = iter(["a <cat>", "a <Dog>, asleep", "never read"])
    method.look(read)
    assert next(read) == "never read"
    with pytest.raises(UserError, match=r"no caption contains the token '<dog>'.*begin with 'a <cat>'"):
        method.look(["a <cat>", "a dog"])


# --- with others ------------------------------------------------------------------------------------------------


def test_beside_a_lora() -> None:
    """Pivotal tuning: one adapter holds both."""
    base, method, _ = prepared(vectors=2)
    lora = LoRA(LoRA.Options.model_validate({"kind": "lora", "rank": 2, "targets": ["attention", "text-encoder"]}))
    lora.prepare(base, 0)
    states = base.encode_text(["a <cat>"])["states"]
    base.predict(torch.randn(1, 4, 8, 8), torch.tensor([5]), base.condition({"states": states})).sum().backward()
    grad = vectors(method).grad
    assert grad is not None and grad.count_nonzero() == grad.numel()
    both = lora.adapter() + method.adapter()
    assert both.deltas.keys() == lora.deltas.keys() and both.embeddings.keys() == {"<cat>"}


def test_the_rate_is_the_method_s_own_where_the_recipe_names_none() -> None:
    def rate(train: dict[str, Any], **options: Any) -> float | None:
        tree = {"base": {"path": "x"}, "train": train,
                "method": [{"kind": "textual_inversion", "token": "<a>", **options}, {"kind": "lora"}]}
        recipe = make_recipe(tree)
        assert make_recipe(recipe.plain()) == recipe and recipe.method[1].learning_rate is None
        return recipe.method[0].learning_rate

    assert rate({}) == 5e-4 and rate({}, learning_rate=1e-3) == 1e-3
    assert rate({"learning_rate": 1e-4}) is None and rate({"optimizer": "prodigy"}) is None
    assert rate({"optimizer": "lion"}) == pytest.approx(1e-4)
