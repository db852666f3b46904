"""CoCa: masks and losses as the paper has them, and one gradient of the caption loss for every split of a batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from mmcontrast import load
from mmcontrast.batch import Batch, MicroBatch
from mmcontrast.cached import forward_backward
from mmcontrast.config import ConfigError
from mmcontrast.encoders import CascadePool, CoCaText, Encoder, MultiEncoder, TextTransformer
from mmcontrast.encoders.coca import visible_to
from mmcontrast.heads import Captioning
from mmcontrast.heads.vocabulary import summed_cross_entropy
from mmcontrast.objectives import InfoNCE
from mmcontrast.sharding import Result, World, value_and_grad
from tests import coca, tiny
from tests.coca import TEXTS, batch_of, build, head_of, model_config, slow_caption_loss, slow_contrastive_loss
from tests.conftest import SIZES, GlooPool

# ------------------------------------------------------------------------------------------------- the text tower


def test_the_mask_of_a_padded_text() -> None:
    """A text of four tokens padded to seven, then the CLS."""
    rows = """
    10000000
    11000000
    11100000
    11110000
    11110000
    11110000
    11110000
    11110001
    """
    want = torch.tensor([[c == "1" for c in row] for row in rows.split()])
    assert torch.equal(visible_to(torch.tensor([4]), 7)[0], want)
    both = visible_to(torch.tensor([7, 4]), 7)
    assert torch.equal(both[1], want) and torch.equal(both[0], torch.ones(8, 8).tril().bool())


def _open_clip_text(encoder: CoCaText, *, correct: bool) -> Any:
    from open_clip.transformer import TextTransformer as Theirs

    tower: Any = encoder.tower
    width = encoder.dim
    theirs: Any = Theirs(
        context_length=encoder.context_length,
        vocab_size=encoder.vocab_size,
        width=width,
        heads=encoder.heads,
        layers=len(tower.transformer.resblocks),
        embed_cls=True,
        output_dim=None,
        correct_cls_mask=correct,
        output_tokens=True,
    ).double()
    theirs.load_state_dict(tower.state_dict())
    return theirs


def test_the_mask_is_open_clips_corrected_one_and_not_its_old_one() -> None:
    encoder = cast(CoCaText, build().encoder("text"))
    text = torch.tensor([[1, 2, 3, 4, 0, 0, 0, 0, 0]])
    for correct, want in ((True, "1111000001"), (False, "1111100000")):
        theirs = _open_clip_text(encoder, correct=correct)
        added = theirs._build_additive_mask(text, 10, torch.float64)[0] + theirs.attn_mask
        assert "".join(str(int(v == 0)) for v in added[-1]) == want
    assert "".join(str(int(v)) for v in visible_to(torch.tensor([4]), 9)[0, -1]) == "1111000001"


@pytest.mark.parametrize("train", [True, False], ids=["training", "evaluation"])
def test_the_text_tower_is_open_clips_where_that_one_is_right(train: bool) -> None:
    encoder = cast(CoCaText, build().encoder("text")).train(train)
    theirs = _open_clip_text(cast(CoCaText, encoder), correct=True).train(train)
    texts = [t for t in TEXTS if "©" not in t]
    transform = encoder.transform(train=False)
    inputs = transform.collate([transform(t) for t in texts])
    padded = encoder.tokenizer(texts)  # pyright: ignore
    assert torch.equal(inputs["ids"], padded[:, : inputs["ids"].shape[1]]), "tokens are not open_clip's"
    with torch.no_grad():
        pooled, tokens = encoder(inputs)
        want_pooled, want_tokens = theirs(padded)
    torch.testing.assert_close(pooled, want_pooled, rtol=1e-10, atol=1e-12)
    for i, length in enumerate(inputs["lengths"].tolist()):
        torch.testing.assert_close(tokens[i, :length], want_tokens[i, :length], rtol=1e-10, atol=1e-12)
    old = _open_clip_text(cast(CoCaText, encoder), correct=False)(padded)[0]
    assert (old - pooled).abs().max() > 1e-3, "the old mask would have passed"


def test_padding_and_neighbours_change_nothing() -> None:
    encoder = cast(CoCaText, build().encoder("text"))
    transform = encoder.transform(train=False)
    inputs = transform.collate([transform(t) for t in TEXTS])
    with torch.no_grad():
        pooled, tokens = encoder(inputs)
        hidden = torch.arange(inputs["ids"].shape[1]) >= inputs["lengths"][:, None]
        assert hidden.any()
        other = torch.where(hidden, torch.randint(1, 49406, inputs["ids"].shape), inputs["ids"])
        again, tokens_again = encoder({"ids": other, "lengths": inputs["lengths"]})
        assert torch.equal(pooled, again) and torch.equal(tokens[~hidden], tokens_again[~hidden])
        for i, text in enumerate(TEXTS):  # alone, so with less padding or none
            one, tokens_of_one = encoder(transform.collate([transform(text)]))
            torch.testing.assert_close(one[0], pooled[i], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(tokens_of_one[0], tokens[i, : len(tokens_of_one[0])], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(
                encoder.prefix(transform(text)[None])[0], tokens_of_one[0], rtol=1e-12, atol=1e-12
            )


def test_a_token_with_the_id_of_padding_is_a_token() -> None:
    encoder = cast(CoCaText, build().encoder("text"))
    transform = encoder.transform(train=False)
    x = transform.collate([transform("!©"), transform("a cat is")])
    assert x["ids"][0].tolist() == [encoder.start, 0, 5811, encoder.end, 0] and x["lengths"].tolist() == [4, 5]
    changed = {
        "ids": x["ids"].index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(7)),
        "lengths": x["lengths"],
    }
    assert (encoder(x)[0] - encoder(changed)[0])[0].abs().max() > 1e-3, "the CLS did not see it"


def test_a_text_cannot_spell_its_own_end() -> None:
    encoder = cast(CoCaText, build().encoder("text"))
    ids = encoder.transform(train=False)("a <end_of_text> b <start_of_text> c").tolist()
    assert ids.count(encoder.end) == ids.count(encoder.start) == 1 and encoder.decode(ids[1:-1]) == "a b c"
    assert len(encoder.transform(train=False)(TEXTS[3])) == encoder.context_length


# ------------------------------------------------------------------------------------------------- pooling


def test_the_contrastive_query_looks_at_the_caption_queries() -> None:
    encoder = build().encoder("image")
    assert isinstance(encoder, CascadePool) and encoder.dim == 8
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    pooled, tokens = encoder(x)
    assert pooled.shape == (2, 8) and tokens.shape == (2, 3, 8)
    patches: Any = encoder.tower(x)[1]
    for b in range(2):
        want = _pool(encoder.captions, list(patches[b]))
        torch.testing.assert_close(tokens[b], torch.stack(want), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pooled[b], _pool(encoder.contrast, want)[0], rtol=1e-10, atol=1e-12)


def _pool(pooler: Any, tokens: list[Tensor]) -> list[Tensor]:
    """Attention of learned queries, in loops; keys of another width have their own projections."""
    layer = pooler.attn
    width, d = layer.embed_dim, layer.embed_dim // layer.num_heads
    whole = layer.in_proj_weight
    of_q, of_k, of_v = (
        whole.split(width) if whole is not None else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    )
    plus_q, plus_k, plus_v = layer.in_proj_bias.split(width)
    keys = [coca.norm(pooler.ln_k, t) for t in tokens]
    found: list[Tensor] = []
    for query in pooler.query:
        q = of_q @ coca.norm(pooler.ln_q, query) + plus_q
        parts: list[Tensor] = []
        for head in range(layer.num_heads):
            part = slice(head * d, (head + 1) * d)
            weights = torch.stack([(q[part] @ (of_k @ k + plus_k)[part] / d**0.5).exp() for k in keys])
            values = torch.stack([(of_v @ k + plus_v)[part] for k in keys])
            parts.append((weights / weights.sum()) @ values)
        found.append(layer.out_proj.weight @ torch.cat(parts) + layer.out_proj.bias)
    return found


# ------------------------------------------------------------------------------------------------- the loss


def _inputs(model: MultiEncoder, texts: tuple[str, ...]) -> Batch:
    return batch_of(model, list(texts), [True] * len(texts))


def test_the_loss_is_the_sum_over_real_targets() -> None:
    model = build()
    batch = _inputs(model, TEXTS)
    total = model(batch.inputs, batch.rows)["caption"]
    lengths = batch.inputs["text"]["lengths"].tolist()
    assert int(head_of(model).count(batch)) == sum(n - 1 for n in lengths) and min(lengths) == 2
    tokens = model.encoder("image")(batch.inputs["image"])[1]
    assert tokens is not None
    want = [
        slow_caption_loss(model, batch.inputs["text"]["ids"][i, :n].tolist(), tokens[i]) for i, n in enumerate(lengths)
    ]
    torch.testing.assert_close(total, torch.stack(want).sum(), rtol=1e-10, atol=0)
    assert torch.stack(want).std() > 1
    # Another picture is another loss: the decoder does look.
    swapped = slow_caption_loss(model, batch.inputs["text"]["ids"][0, : lengths[0]].tolist(), tokens[3])
    assert (swapped - want[0]).abs() > 1e-4


def test_loss_and_gradients_are_open_clips_where_that_one_is_right() -> None:
    from open_clip.coca_model import CoCa
    from open_clip.loss import CoCaLoss

    model = build()
    head, text = head_of(model), cast(CoCaText, model.encoder("text"))
    sizes: dict[str, Any] = {"context_length": 9, "vocab_size": text.vocab_size, "width": 8, "heads": 2, "layers": 2}
    vision = {"image_size": 16, "patch_size": 8, "width": 8, "layers": 1, "head_width": 4, "output_tokens": True}
    theirs: Any = CoCa(
        8,
        multimodal_cfg=cast(Any, sizes),
        text_cfg=cast(Any, sizes | {"embed_cls": True, "output_tokens": True}),
        vision_cfg=cast(Any, vision),
    ).double()
    theirs.text.load_state_dict(text.tower.state_dict(), strict=False)
    decoder = head.decoder.state_dict() | {"text_projection": head.vocabulary.weight.T}
    theirs.text_decoder.load_state_dict(decoder)

    def compare(texts: list[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch = _inputs(model, tuple(texts))
        _, tokens = model.encoder("image")(batch.inputs["image"])
        assert tokens is not None
        leaf, other = (tokens.detach().requires_grad_() for _ in range(2))
        mean = head(batch.inputs, {"image": leaf, "text": text(batch.inputs["text"])[1]}) / head.count(batch)
        out = theirs(None, text.tokenizer(texts), image_latent=torch.zeros(1), image_embs=other)
        zero = torch.zeros(len(texts), 4, dtype=torch.float64)
        _, want = CoCaLoss(caption_loss_weight=2.0, clip_loss_weight=0.0)(zero, zero, out["logits"], out["labels"], 1.0)
        model.zero_grad()
        (2.0 * mean).backward()
        want.backward()
        assert leaf.grad is not None and other.grad is not None
        return 2.0 * mean, want, leaf.grad, other.grad

    ours, want, grad, want_grad = compare([t for t in TEXTS if "©" not in t])
    torch.testing.assert_close(ours, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(grad, want_grad, rtol=1e-9, atol=1e-14)
    assert want_grad.abs().max() > 1e-5
    for mine, other in ((head.vocabulary.weight, theirs.text_decoder.text_projection), (text.tower.cls_emb, None)):
        if other is None:
            assert mine.grad is None or not mine.grad.any(), "the CLS is no part of a caption"
        else:
            assert mine.grad is not None
            torch.testing.assert_close(mine.grad, other.grad.T, rtol=1e-9, atol=1e-14)
    ours, want, *_ = compare(["!© sign", "a cat"])  # there the first word, whose id is 0, costs nothing
    assert (ours - want).abs() > 1e-3


@pytest.mark.parametrize("chunk", [1, 20, 50, 1000])
def test_cross_entropy_in_chunks_is_torchs(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (50, 40))
    targets = torch.randint(0, 40, (50,), generator=generator)
    ours, theirs = ((hidden.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        got = summed_cross_entropy(ours[0], ours[1], targets, chunk=chunk)
    want = nn.functional.cross_entropy(theirs[0] @ theirs[1].T, targets, reduction="sum")
    (got * 0.3).backward()
    (want * 0.3).backward()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        assert a.grad is not None and b.grad is not None and b.grad.abs().max() > 0.1
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-13)
    assert saved and max(saved) <= 150, "the logits were kept"
    with torch.no_grad():
        torch.testing.assert_close(summed_cross_entropy(hidden, weight, targets, chunk=chunk), want.detach())

    half = (hidden.float().requires_grad_(), weight.float().requires_grad_())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = summed_cross_entropy(half[0], half[1], targets, chunk=chunk)
    low.backward()
    assert low.dtype == torch.float32 and all(t.grad is not None and t.grad.dtype == torch.float32 for t in half)
    torch.testing.assert_close(low.double(), want.detach(), rtol=1e-2, atol=0)


# ------------------------------------------------------------------------------------------------- every split

ROWS = 12
MANY: list[str | None] = [*TEXTS, "a red bar", "three", "a small black corner of a white square", "!©!", "b", "cats"]


def whole_batch(model: MultiEncoder, missing: bool) -> Batch:
    """The global batch; with `missing`, rows 3..5 (rank 1 of 4) have no pair, and a micro-batch of 5 ends with one."""
    texts, pictures = list(MANY), [True] * ROWS
    if missing:
        for i in (3, 5, 7, 10, 11):
            texts[i] = None
        pictures[4] = pictures[0] = pictures[11] = False
    return batch_of(model, texts, pictures, seed=4)


def rows_of_rank(batch: Batch, world: World) -> Batch:
    n = ROWS // world.size
    (piece,) = [p for p in batch.split(n) if p.start == world.rank * n]
    rows = {m: r - piece.start for m, r in piece.rows.items()}
    return Batch(inputs=piece.inputs, rows=rows, ids=batch.ids[piece.start : piece.start + n])


Found = tuple[float, float, dict[str, Tensor], bool]
"""Loss, caption loss, gradients summed over ranks (on rank 0), and whether every parameter was touched on this one."""


def steps_in_pieces(group: Any, micro_batches: tuple[int, ...], missing: bool) -> list[Found]:
    world, model = World(group), build()
    objective = InfoNCE.Config(weight=0.5).build().double()
    batch = rows_of_rank(whole_batch(model, missing), world)

    def loss(z: Any, present: Any) -> Result:
        return value_and_grad({"clip": objective}, z, present, batch.ids, block=5, world=world)

    found: list[Found] = []
    for micro_batch in micro_batches:
        model.zero_grad()
        result = forward_backward(
            lambda piece: model(piece.inputs),
            batch,
            loss,
            micro_batch=micro_batch,
            seed=(0,),
            heads=model.terms,
            encode_with_heads=lambda piece: model(piece.inputs, piece.rows),
            world=world,
        )
        parameters = dict(model.named_parameters())
        touched = all(p.grad is not None for p in parameters.values())
        total = world.sum([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()])
        gradients = dict(zip(parameters, total, strict=True)) if world.rank == 0 else {}
        found.append((float(result.loss), float(result.terms["caption"]), gradients, touched))
    return found


@pytest.fixture(scope="module", params=[False, True], ids=["complete", "missing"])
def reference(request: pytest.FixtureRequest) -> tuple[bool, float, float, dict[str, Tensor]]:
    """Plain autograd of the slow formulas on the whole batch."""
    model, missing = build(), request.param
    batch = whole_batch(model, missing)
    present = {m: batch.present(m) for m in batch.rows}
    z: dict[str, Tensor] = {}
    tokens: dict[str, Any] = {}
    for m in batch.rows:
        pooled, tokens[m] = model.encoder(m)(batch.inputs[m])
        z[m] = torch.zeros(ROWS, 6, dtype=torch.float64).index_copy(
            0, batch.rows[m], nn.functional.normalize(model.projections[m](pooled), dim=-1)
        )
    sums: list[Tensor] = []
    words = 0
    for i in range(ROWS):
        if present["image"][i] and present["text"][i]:
            at = {m: batch.rows[m].tolist().index(i) for m in batch.rows}
            n = int(batch.inputs["text"]["lengths"][at["text"]])
            ids = batch.inputs["text"]["ids"][at["text"], :n].tolist()
            sums.append(slow_caption_loss(model, ids, tokens["image"][at["image"]]))
            words += n - 1
    caption = torch.stack(sums).sum() / words
    scale = InfoNCE.Config().build().double().log_scale.exp()
    contrastive = slow_contrastive_loss(z["image"], z["text"], present["image"], present["text"], scale)
    loss = 0.5 * contrastive + 2.0 * caption
    loss.backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return missing, float(loss.detach()), float(caption.detach()), gradients


@pytest.mark.parametrize("world", SIZES)
def test_same_gradient_everywhere(
    gloo: GlooPool, reference: tuple[bool, float, float, dict[str, Tensor]], world: int
) -> None:
    missing, loss, caption, gradients = reference
    moving = [n for n, g in gradients.items() if g.abs().max() > 1e-6]
    parts = ("encoders.image.tower", "encoders.image.captions", "encoders.text", "heads.caption", "projections")
    assert all(any(name.startswith(part) for name in moving) for part in parts), "a part does not train"
    answers = gloo(world, steps_in_pieces, (1, 5, ROWS), missing)
    for found in answers:
        for got_loss, got_caption, _, touched in found:
            assert got_loss == pytest.approx(loss, rel=1e-9) and got_caption == pytest.approx(caption, rel=1e-9)
            assert touched, "a parameter without gradient would make another rank wait"
    for _, _, got, _ in answers[0]:
        assert got.keys() == gradients.keys()
        for name, want in gradients.items():
            error = float((got[name] - want).abs().max())
            assert error <= 1e-9 * max(1.0, float(want.abs().max())), f"{name}: {error:.2e}"


def test_a_mean_of_means_would_be_another_loss(reference: tuple[bool, float, float, dict[str, Tensor]]) -> None:
    missing, _, caption, _ = reference
    model = build()
    batch = whole_batch(model, missing)
    means: list[float] = []
    total, count = 0.0, 0
    for piece in batch.split(3):
        part = Batch(inputs=piece.inputs, rows={m: r - piece.start for m, r in piece.rows.items()}, ids=batch.ids[:3])
        with torch.no_grad():
            value, n = float(model(part.inputs, part.rows)["caption"]), int(head_of(model).count(part))
        assert (n == 0) == (value == 0)
        total, count = total + value, count + n
        means += [value / n] if n else []
    assert total / count == pytest.approx(caption, rel=1e-12)
    assert abs(sum(means) / len(means) - caption) > 1e-3


def _note(seen: list[str], name: str, *_: Any) -> None:
    seen.append(name)


def test_the_decoder_runs_once_for_each_micro_batch() -> None:
    """The first pass of the cache leaves it out; the last micro-batch keeps the graph of its only forward."""
    model = build()
    seen: list[str] = []
    watched = {"head": head_of(model), "image": model.encoder("image"), "text": model.encoder("text")}
    for name, module in watched.items():
        module.register_forward_hook(partial(_note, seen, name))
    batch = whole_batch(model, True)
    objective = InfoNCE.Config().build().double()

    def run(piece: MicroBatch, heads: bool) -> Any:
        return model(piece.inputs, piece.rows) if heads else model(piece.inputs)

    forward_backward(
        lambda piece: run(piece, False),
        batch,
        lambda z, present: value_and_grad({"clip": objective}, z, present, batch.ids),
        micro_batch=3,
        seed=(0,),
        heads=model.terms,
        encode_with_heads=lambda piece: run(piece, True),
    )
    assert [seen.count(name) for name in watched] == [4, 7, 7]
    with_heads, without = model(batch.inputs, batch.rows), model(batch.inputs)
    assert with_heads.keys() - without.keys() == {"caption"}
    assert all(torch.equal(with_heads[m], without[m]) for m in without)


def test_frozen_towers_are_pooled_ahead_only_where_no_head_needs_their_tokens() -> None:
    config = model_config()
    for tower in config.encoders.values():
        tower.freeze = ("all",)
    model = build(config)
    batch = whole_batch(model, True)
    sizes = dict.fromkeys(batch.rows, 5)
    assert model.pool_frozen(batch, sizes).inputs == batch.inputs
    config.heads = {}
    pooled = build(config).pool_frozen(batch, sizes).inputs
    assert all(list(pooled[m]) != list(batch.inputs[m]) for m in pooled)
    model(batch.inputs, batch.rows)["caption"].backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained and all(name.startswith("heads.") for name in trained)


# ------------------------------------------------------------------------------------------------- settings


class Mute(TextTransformer):
    """A text tower that gives no tokens."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(x)[0], None


IMAGE, TEXT = model_config().encoders["image"], model_config().encoders["text"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": {"c": Captioning.Config(source="audio")}}, "reads the modality 'audio'; the model has image, text"),
        ({"heads": {"c": Captioning.Config(heads=3)}}, "layers 12 must be at least 1, heads 3 divide width 8"),
        ({"heads": {"text": Captioning.Config()}}, "the head name 'text' must be an identifier .* and no modality"),
        ({"encoders": {"image": IMAGE, "text": tiny.text_transformer()}}, "causal text tower such as CoCaText; 'text'"),
        ({"encoders": {"image": tiny.vit(), "text": TEXT}}, "one width, but found image 16, text 8; a CascadePool"),
        (
            {"encoders": {"image": Mute.Config(width=16, heads=2, layers=1), "text": TEXT}},
            "needs? tokens, and the tower 'image' .Mute. gives none",
        ),
        (
            {"encoders": {"image": CascadePool.Config(tower=Mute.Config(width=16, heads=2, layers=1)), "text": TEXT}},
            "Mute gives no tokens that could be pooled",
        ),
        ({"encoders": {"image": CascadePool.Config(tower=tiny.vit(), queries=0), "text": TEXT}}, "queries is 0"),
        ({"encoders": {"image": CascadePool.Config(tower=tiny.vit(), heads=3), "text": TEXT}}, "heads 3 must divide"),
        ({"encoders": {"image": IMAGE, "text": CoCaText.Config(width=8, heads=3)}}, "heads 3 must divide width 8"),
        ({"encoders": {"image": IMAGE, "text": CoCaText.Config(context_length=2)}}, "context_length 2 leaves no room"),
    ],
)
def test_settings_that_fit_no_model_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model_config(**changes).build()


def test_a_pooled_tower_keeps_its_own_settings(tmp_path: Path) -> None:
    """Frozen inside, it stays in evaluation mode; its poolers train; and a run builds it again."""
    inner: Encoder.Config = tiny.vit(freeze=("all",), patch_dropout=0.5)
    config = CascadePool.Config(tower=inner, queries=2, heads=2)
    encoder: CascadePool = config.build().train()
    assert encoder.training and not encoder.tower.training and encoder.kind == "image"
    encoder(encoder.example())[0].sum().backward()
    assert all(p.grad is None for p in encoder.tower.parameters())
    assert all(p.grad is not None for p in encoder.captions.parameters())
    run = tiny.write_run(tmp_path / "run", MultiEncoder.Config(encoders={"image": config}, dim=4))
    assert load(run).encode("image", [tiny.png("red")]).shape == (1, 4)
