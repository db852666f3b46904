"""Text models of every kind that transformers has: encoder-decoders, decoders, two-tower models, many languages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcontrast.config import ConfigError
from mmcontrast.data import Stream
from mmcontrast.encoders import BagOfWords, CoCaText, Encoder, HFText, MultiEncoder
from mmcontrast.objectives import InfoNCE
from mmcontrast.shard_writer import Sample
from mmcontrast.trainer import Trainer
from tests import hf_models, tiny

TEXTS = ["a red square", "собака лает", "犬が庭で吠えている", "un carré", "a photo of a red square and of a dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    at = tmp_path_factory.mktemp("hub")
    made = {"t5": hf_models.t5, "bart": hf_models.bart, "gpt2": hf_models.gpt2, "clip": hf_models.clip}
    return {name: make(at / name) for name, make in made.items()}


TOWERS: dict[str, Callable[[dict[str, str]], HFText.Config]] = {
    "T5's encoder": lambda f: HFText.Config(model=f["t5"]),
    "T5's encoder, its end": lambda f: HFText.Config(model=f["t5"], pool="eos"),
    "BART's encoder": lambda f: HFText.Config(model=f["bart"], pool="cls", max_length=20),
    "GPT-2": lambda f: HFText.Config(model=f["gpt2"], pool="last", max_length=40),
    "GPT-2 with an end": lambda f: HFText.Config(model=f["gpt2"], pool="eos", max_length=40),
    "CLIP's text tower": lambda f: HFText.Config(model=f["clip"], pool="eos", max_length=12),
    "CLIP's text tower, projected": lambda f: HFText.Config(
        model=f["clip"], pool="pooler", projected=True, max_length=12
    ),
}


@pytest.fixture(params=list(TOWERS))
def tower(request: pytest.FixtureRequest) -> str:
    return request.param


def build(config: Encoder.Config) -> Any:
    torch.manual_seed(0)
    return config.build().eval()


def inputs(encoder: Any, texts: list[str]) -> Any:
    made = encoder.transform(train=False)
    return made.collate([made(text) for text in texts])


@torch.no_grad()
def test_texts_are_independent(folders: dict[str, str], tower: str) -> None:
    net = build(TOWERS[tower](folders))
    together, tokens = net(inputs(net, TEXTS))
    assert together.shape == (5, net.dim) and net.dim == (12 if "projected" in tower else 16) and tokens is not None
    alone = torch.cat([net(inputs(net, [text]))[0] for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.cdist(together, together).fill_diagonal_(1).min() > 1e-3, "languages are not told apart"


def test_every_weight_gets_a_gradient(folders: dict[str, str], tower: str) -> None:
    net = build(TOWERS[tower](folders)).train()
    for seed in range(3):  # no layer is dropped, in none of them
        torch.manual_seed(seed)
        net.zero_grad()
        pooled = net(inputs(net, TEXTS))[0]
        (pooled * torch.randn(pooled.shape)).sum().backward()
        assert not [n for n, p in net.named_parameters() if p.requires_grad and p.grad is None]


def test_a_run_needs_its_origin_no_more(folders: dict[str, str], tower: str, tmp_path: Path) -> None:
    import shutil

    from mmcontrast import load

    moved = {n: str(shutil.copytree(p, tmp_path / n)) for n, p in folders.items()}
    run = tiny.write_run(tmp_path / "run", MultiEncoder.Config(encoders={"m": TOWERS[tower](moved)}, dim=8))
    want = load(run).encode("m", TEXTS)
    for folder in moved.values():
        shutil.rmtree(folder)
    assert torch.equal(load(run).encode("m", TEXTS), want)


@torch.no_grad()
def test_the_encoder_of_an_encoder_decoder_is_what_transformers_computes(folders: dict[str, str]) -> None:
    from transformers import AutoTokenizer, T5EncoderModel

    theirs = T5EncoderModel.from_pretrained(folders["t5"]).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folders["t5"])
    x = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert (x["input_ids"] == 1).sum(1).tolist() == [1] * 5 and len(set(x["attention_mask"].sum(1).tolist())) > 2
    hidden = theirs(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).last_hidden_state
    mean, end = (build(HFText.Config(model=folders["t5"], pool=p)) for p in ("mean", "eos"))
    assert not any("decoder" in name for name, _ in mean.named_parameters())
    for row in range(5):
        count = int(x["attention_mask"][row].sum())
        torch.testing.assert_close(mean(inputs(mean, TEXTS))[0][row], hidden[row, :count].mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(end(inputs(end, TEXTS))[0][row], hidden[row, count - 1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_clip_pools_where_its_argmax_is(folders: dict[str, str]) -> None:
    from transformers import AutoTokenizer, CLIPModel

    theirs: Any = CLIPModel.from_pretrained(folders["clip"]).eval()
    x: Any = AutoTokenizer.from_pretrained(folders["clip"])(["abc", "zebra", "q"], padding=True, return_tensors="pt")
    assert (x["input_ids"] == 49).sum() > 3, "padding must be the end of text, too"
    found = theirs.text_model(**x)
    at = x["input_ids"].argmax(1)
    want = found.last_hidden_state[torch.arange(3), at]
    end = build(HFText.Config(model=folders["clip"], pool="eos", max_length=12))
    torch.testing.assert_close(end(inputs(end, ["abc", "zebra", "q"]))[0], want, rtol=1e-4, atol=1e-5)
    own = build(HFText.Config(model=folders["clip"], pool="pooler", projected=True, max_length=12))
    want = theirs.get_text_features(**x).pooler_output
    torch.testing.assert_close(own(inputs(own, ["abc", "zebra", "q"]))[0], want, rtol=1e-4, atol=1e-5)


def test_a_decoder_gets_an_end_also_where_a_text_is_cut(folders: dict[str, str]) -> None:
    made = build(HFText.Config(model=folders["gpt2"], pool="eos", max_length=6)).transform(train=False)
    plain = build(HFText.Config(model=folders["gpt2"], pool="last", max_length=6)).transform(train=False)
    for text in TEXTS:
        assert made(text)[-1] == 1 and 1 not in plain(text) and len(made(text)) <= 6
        assert made(text)[:-1] == plain(text)[: len(made(text)) - 1]
        assert made.cut(text, made(text)) is (len(plain.ids(text)) + 1 > 6)
    assert any(made.cut(text, made(text)) for text in TEXTS)
    # One that ends its texts itself gets no second one.
    t5 = build(HFText.Config(model=folders["t5"], pool="eos", max_length=6)).transform(train=False)
    assert all(t5(text).count(1) == 1 for text in TEXTS)


def test_a_prefix_goes_before_every_text(folders: dict[str, str]) -> None:
    plain, asked = (build(HFText.Config(model=folders["t5"], prefix=p)) for p in ("", "query: "))
    assert asked.transform(train=True)("un carré") == plain.transform(train=True)("query: un carré")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("bart", {"max_length": 21}, "cannot read max_length 21 tokens"),
        ("gpt2", {"max_length": 2}, "max_length 2 leaves no room"),
        ("t5", {"pool": "pooler"}, "pools nothing itself"),
        ("t5", {"projected": True}, "has no projection of its own"),
        ("clip", {"projected": True, "max_length": 12}, "use pool 'pooler'"),
    ],
)
def test_settings_that_make_no_tower_are_refused(
    folders: dict[str, str], name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        HFText.Config(model=folders[name], **settings).build()
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------------- what is cut


@pytest.mark.parametrize("kind", ["clip", "coca", "words", "t5"])
def test_a_text_is_told_to_be_cut_where_it_is(folders: dict[str, str], kind: str) -> None:
    configs: dict[str, Encoder.Config] = {
        "clip": tiny.text_transformer(context_length=6),
        "coca": CoCaText.Config(context_length=6, width=16, layers=1, heads=2),
        "words": BagOfWords.Config(buckets=20, width=4, max_words=4),
        "t5": HFText.Config(model=folders["t5"], max_length=6),
    }
    made = build(configs[kind]).transform(train=False)
    # Found by a far longer limit, whatever the tokenizer.
    long: dict[str, Encoder.Config] = {
        "clip": tiny.text_transformer(context_length=60),
        "coca": CoCaText.Config(context_length=60, width=16, layers=1, heads=2),
        "words": BagOfWords.Config(buckets=20, width=4, max_words=60),
        "t5": HFText.Config(model=folders["t5"], max_length=60),
    }
    whole = build(long[kind]).transform(train=False)

    def length(x: Any) -> int:
        return int((x != 0).sum()) if kind == "clip" else len(x)

    texts = ["a", "one two", "one two six", "a a a a", "a a a a a", "one two three four", "one two three four five", ""]
    told = [made.cut(text, made(text)) for text in texts]
    limit = 4 if kind == "words" else 6
    assert told == [length(whole(text)) > limit for text in texts] and True in told and False in told


def test_a_run_counts_the_texts_that_it_cut(tmp_path: Path) -> None:
    long = {"txt": "one two three four five six seven eight nine ten eleven"}
    content = [Sample(s.key, {**s.members, **(long if i % 3 == 0 else {})}) for i, s in enumerate(tiny.samples(12))]
    data = tiny.write_shards(tmp_path / "data", content)
    config = Trainer.Config(
        model=tiny.model_config(),
        data=Stream.Config(shards=(data,), workers=1),
        objectives={"clip": InfoNCE.Config()},
        steps=6,
        global_batch=4,
        log_every=3,
        out=tmp_path / "run",
    )
    config.build().fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["data/text"], line["data/text_cut"]) for line in lines if "data/text" in line] == [(12, 4), (24, 8)]
    assert "data/image_cut" not in lines[0]
