"""Sounds: decoding is bounded and safe, the front end equals a slow reference, padding and loudness change nothing."""

from __future__ import annotations

import io
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from mmcontrast.config import ConfigError
from mmcontrast.decode import MAX_AUDIO_SECONDS, Sound, audio, audio_from
from mmcontrast.encoders import BagOfWords, MelConvNet, MelTransformer, MultiEncoder
from mmcontrast.encoders.audio import AudioTransform, LogMel
from mmcontrast.shards import BadSample

RATE = 8000


def tone(seconds: float = 0.5, hertz: float = 440.0, *, rate: int = RATE, channels: int = 1) -> np.ndarray:
    """[T, channels] with a slightly different tone per channel."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * (hertz + 50 * c) * time) for c in range(channels)], 1).astype(np.float32)


def encode(samples: np.ndarray, form: str = "WAV", subtype: str | None = None, *, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


# -------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    ("form", "subtype", "error"),
    [("WAV", "PCM_16", 1e-4), ("WAV", "FLOAT", 1e-7), ("FLAC", None, 1e-4), ("OGG", "VORBIS", 0.2), ("MP3", None, 0.2)],
)
def test_every_format_gives_mono_at_its_rate(form: str, subtype: str | None, error: float) -> None:
    samples = tone(channels=2)
    sound = audio(encode(samples, form, subtype))
    assert sound.rate == RATE and abs(sound.frames - len(samples)) <= 1200  # MP3 pads
    found = sound.read()
    assert found.dtype == torch.float32 and len(found) == sound.frames
    want = [(float(left) + float(right)) / 2 for left, right in samples]
    if form != "MP3":
        assert len(found) == len(want)
        assert max(abs(a - b) for a, b in zip(found.tolist(), want, strict=True)) < error


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG"])
def test_a_part_is_the_same_as_in_the_whole(form: str) -> None:
    sound = audio(encode(tone(1.0), form))
    assert torch.allclose(sound.read(3000, 500), sound.read()[3000:3500], atol=1e-6)
    assert sound.read(3000, 500).abs().max() > 0.3


def test_only_the_crop_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    read = soundfile.SoundFile.read

    def watched(self: Any, frames: int = -1, *args: Any, **kwargs: Any) -> Any:
        asked.append(frames)
        return read(self, frames, *args, **kwargs)

    data = encode(np.zeros(50 * 60 * RATE, np.int16), "FLAC")  # fifty minutes of silence are a few kB
    monkeypatch.setattr(soundfile.SoundFile, "read", watched)
    made = AudioTransform(RATE, 2.0, "zero", train=True)(data)
    assert asked == [2 * RATE] and len(data) < 200_000 and len(made["samples"]) == 2 * RATE


def flac_of_unknown_length() -> bytes:
    """A FLAC whose header says 0 samples, which means unknown."""
    data = bytearray(encode(tone(), "FLAC"))
    data[21] &= 0xF0  # STREAMINFO follows 8 bytes of head; the count is the low 36 bits of its bytes 13..17
    data[22:26] = bytes(4)
    return bytes(data)


def wav_header(*, rate: int = RATE, channels: int = 1) -> bytes:
    content = bytes(2 * channels * 10)
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(content)) + content
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not WAV, FLAC, Ogg or MP3"),
        (b"%!PS-Adobe", "not WAV, FLAC, Ogg or MP3"),
        (encode(tone(), "AIFF"), "not WAV, FLAC, Ogg or MP3"),
        (encode(tone(), "AU"), "not WAV, FLAC, Ogg or MP3"),
        (b"RIFF\x00\x00\x00\x00WAVE" + b"\x00" * 40, "cannot be decoded"),
        (b"fLaC" + b"\x00" * 100, "cannot be decoded"),
        (encode(np.zeros((0, 1), np.float32)), "empty"),
        (wav_header(rate=10), "absurd rate"),
        (wav_header(rate=3_000_000), "absurd rate"),
        (wav_header(channels=60), "absurd rate or number of channels"),
        (encode(np.zeros((MAX_AUDIO_SECONDS + 1) * RATE, np.int16), "FLAC"), f"above {MAX_AUDIO_SECONDS} seconds"),
        (flac_of_unknown_length(), "unknown length|empty|cannot be decoded"),
    ],
)
def test_what_is_no_usable_sound_is_refused_by_its_header(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        audio(data)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    samples = tone()
    samples[1234] = value
    sound = audio(encode(samples, "WAV", "FLOAT"))
    assert len(sound.read(0, 1000)) == 1000
    with pytest.raises(BadSample, match="not finite"):
        sound.read(1000, 1000)


def test_a_cut_file_is_refused() -> None:
    data = encode(np.random.default_rng(0).uniform(-0.5, 0.5, RATE), "FLAC")
    sound = audio(data[: len(data) // 2])
    with pytest.raises(BadSample, match="cut off|cannot be decoded"):
        sound.read()


def test_a_sound_can_be_given_in_many_ways(tmp_path: Path) -> None:
    samples = tone(channels=2)
    data = encode(samples, "WAV", "FLOAT")
    (tmp_path / "a.wav").write_bytes(data)
    want = audio(data).read()
    for value in (
        data,
        tmp_path / "a.wav",
        str(tmp_path / "a.wav"),
        (samples, RATE),
        (torch.from_numpy(samples), RATE),
    ):
        found = audio_from(value)
        assert isinstance(found, Sound) and found.rate == RATE and torch.equal(found.read(), want)
    assert torch.equal(audio_from((samples[:, 0], RATE)).read(10, 5), torch.from_numpy(samples[10:15, 0]))
    for value, reason in (
        ("nowhere.wav", "nowhere.wav"),
        (3, "got int"),
        ((np.zeros((2, 2, 2)), RATE), "samples must be floats"),
        ((np.zeros(0), RATE), "samples must be floats"),
        ((np.zeros(9, np.int16), RATE), "samples must be floats"),
    ):
        with pytest.raises(BadSample, match=reason):
            audio_from(value)


# -------------------------------------------------------------------------------------------- crop, rate, padding


def test_crops_are_random_in_training_and_the_middle_otherwise() -> None:
    ramp = np.linspace(-1, 1, 1000, dtype=np.float32)
    train, plain = (AudioTransform(RATE, 0.05, "zero", train=t) for t in (True, False))
    starts: list[int] = []
    for seed in range(40):
        torch.manual_seed(seed)
        found = train((ramp, RATE))
        torch.manual_seed(seed)
        assert torch.equal(train((ramp, RATE))["samples"], found["samples"])
        start = int(np.argmin(np.abs(ramp - found["samples"][0].item())))
        assert np.array_equal(found["samples"].numpy(), ramp[start : start + 400]) and found["length"] == 400
        starts.append(start)
    assert len(set(starts)) > 30 and max(starts) <= 600
    assert np.array_equal(plain((ramp, RATE))["samples"].numpy(), ramp[300:700])


def test_short_sounds_are_padded_or_repeated() -> None:
    short = np.array([0.1, 0.2, 0.3], np.float32)
    zero = AudioTransform(1000, 0.008, "zero", train=True)((short, 1000))
    again = AudioTransform(1000, 0.008, "repeat", train=True)((short, 1000))
    assert zero["samples"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0, 0, 0, 0, 0]) and zero["length"] == 3
    assert again["samples"].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.1, 0.2, 0.3, 0.1, 0.2]) and again["length"] == 8
    both = AudioTransform(1000, 0.008, "zero", train=True).collate([zero, again])
    assert both["samples"].shape == (2, 8) and both["length"].tolist() == [3, 8]


@pytest.mark.parametrize("rate", [11_025, 44_100, 48_000])
def test_other_rates_are_resampled(rate: int) -> None:
    """A tone stays the same tone, and a tone above the new half rate is gone."""
    made = AudioTransform(RATE, 0.4, "zero", train=False)
    found = made((tone(0.5, 440.0, rate=rate), rate))["samples"].numpy()
    want = made((tone(0.5, 440.0, rate=RATE), RATE))["samples"].numpy()
    assert found.shape == want.shape == (3200,)
    spectra = [np.abs(np.fft.rfft(s * np.hanning(len(s)))) for s in (found, want)]
    assert abs(int(spectra[0].argmax()) - int(spectra[1].argmax())) <= 1
    if rate > 20_000:
        high = made((tone(0.5, 7000.0, rate=rate), rate))["samples"]
        assert high[400:-400].abs().max() < 0.02


# -------------------------------------------------------------------------------------------- front end


def slow_log_mel(samples: np.ndarray, rate: int, mels: int, size: int) -> list[list[float]]:
    """Window by window and frequency by frequency: periodic Hann, power, triangles on HTK's mel scale."""
    window, hop = round(0.025 * rate), round(0.010 * rate)
    padded = [0.0] * (size // 2) + [float(s) for s in samples] + [0.0] * (size // 2)
    hann = [0.0] * size
    for i in range(window):
        hann[(size - window) // 2 + i] = 0.5 - 0.5 * math.cos(2 * math.pi * i / window)
    top = 2595 * math.log10(1 + rate / 2 / 700)
    edges = [700 * (10 ** (top * k / (mels + 1) / 2595) - 1) for k in range(mels + 2)]
    found: list[list[float]] = []
    for start in range(0, len(samples) + 1, hop):
        piece = [padded[start + i] * hann[i] for i in range(size)]
        power: list[float] = []
        for k in range(size // 2 + 1):
            real = sum(x * math.cos(2 * math.pi * k * i / size) for i, x in enumerate(piece) if x)
            imaginary = sum(x * math.sin(2 * math.pi * k * i / size) for i, x in enumerate(piece) if x)
            power.append(real * real + imaginary * imaginary)
        bands: list[float] = []
        for low, peak, high in zip(edges, edges[1:], edges[2:], strict=False):
            total = 0.0
            for k, p in enumerate(power):
                hertz = k * rate / size
                total += p * max(0.0, min((hertz - low) / (peak - low), (high - hertz) / (high - peak)))
            bands.append(math.log(total + 1e-6))
        found.append(bands)
    return found


def test_the_front_end_equals_a_slow_reference() -> None:
    rate, mels = 1000, 6
    front = LogMel(rate, mels)
    size = int(front.spectrum.n_fft)
    draw = np.random.default_rng(0)
    lengths = [73, 120]
    batch = torch.zeros(2, 120)
    for row, length in enumerate(lengths):
        batch[row, :length] = torch.from_numpy(draw.uniform(-0.5, 0.5, length))
    found, mask = front(batch, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        slow = slow_log_mel(batch[row].numpy(), rate, mels, size)
        heard = [f for f in range(len(slow)) if f * 10 < length]
        values = [v for f in heard for v in slow[f]]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / len(values)
        assert mask[row].tolist() == [f in heard for f in range(len(slow))]
        for f, bands in enumerate(slow):
            want = [(v - mean) / math.sqrt(variance + 1e-5) if f in heard else 0.0 for v in bands]
            assert found[row, f].tolist() == pytest.approx(want, abs=2e-3)
    assert found.abs().max() > 1


@pytest.mark.parametrize(("rate", "mels"), [(8000, 40), (8000, 80), (16_000, 64), (16_000, 128), (48_000, 64)])
def test_no_band_is_empty(rate: int, mels: int, recwarn: pytest.WarningsRecorder) -> None:
    filters: Any = LogMel(rate, mels).spectrum.mel_scale.fb  # [frequencies, M]
    assert bool((filters.sum(0) > 0).all()) and not [w for w in recwarn if "mel filterbank" in str(w.message)]


# -------------------------------------------------------------------------------------------- the tower


KINDS: dict[Any, dict[str, Any]] = {MelConvNet: {}, MelTransformer: {"patch": 4, "heads": 2}}
Tower = MelConvNet | MelTransformer


def tower(seconds: float = 1.0, kind: type[Tower] = MelConvNet, **settings: Any) -> Tower:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"sample_rate": RATE, "seconds": seconds, "mels": 16, "width": 24, "layers": 2}
    return kind.Config(**shared, **KINDS[kind], **settings).build().eval()


def inputs(net: Tower, *sounds: np.ndarray) -> dict[str, Tensor]:
    made = net.transform(train=False)
    return made.collate([made((sound, RATE)) for sound in sounds])


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.3, 0.3, round(seconds * RATE)).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_and_neighbours_change_nothing(kind: type[Tower]) -> None:
    short, long = tower(1.0, kind), tower(2.5, kind)
    sounds = [noise(0.31), noise(0.7, 1), noise(0.05, 2)]
    want, tokens = short(inputs(short, *sounds))
    assert tokens is not None and want.shape == (3, 24) and tokens.shape[::2] == (3, 24)
    assert torch.allclose(long(inputs(long, *sounds))[0], want, atol=1e-5)
    for row, sound in enumerate(sounds):
        assert torch.allclose(short(inputs(short, sound))[0][0], want[row], atol=1e-5)
        heard = math.ceil(math.ceil(len(sound) / 80) / 4) * (1 if kind is MelConvNet else 4)
        assert bool((tokens[row, heard:] == 0).all()) and bool((tokens[row, :heard] != 0).any(1).all())
    # Not because nothing changes anything: told that the padding is sound, it hears something else.
    told = inputs(short, *sounds)
    told["length"] = torch.full((3,), RATE)
    assert (short(told)[0] - want).abs().max() > 0.1


@torch.no_grad()
def test_loudness_does_not_matter_but_the_sound_does() -> None:
    net = tower()
    sound = noise(0.8)
    want = net(inputs(net, sound))[0]
    assert torch.allclose(net(inputs(net, 0.1 * sound))[0], want, atol=2e-3)
    assert (net(inputs(net, tone(0.8)[:, 0]))[0] - want).abs().max() > 0.1


@torch.no_grad()
def test_silence_has_a_finite_embedding() -> None:
    net = tower()
    assert bool(torch.isfinite(net(inputs(net, np.zeros(100, np.float32)))[0]).all())
    assert bool(torch.isfinite(net(net.example())[0]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_gets_a_gradient(kind: type[Tower]) -> None:
    net = tower(kind=kind)
    net.train()
    net(inputs(net, noise(0.8)))[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())


@torch.no_grad()
def test_spec_augment_silences_one_piece_of_time_and_of_the_bands_in_training_alone() -> None:
    net = tower(time_mask=0.5, mel_mask=0.5)
    heard = inputs(net, noise(0.9), noise(0.4, 1), tone(0.7)[:, 0])
    plain, mask = net.spectra(heard)
    assert torch.equal(net.spectra(heard)[0], plain)
    net.train()
    pieces: list[tuple[int, int]] = []
    for seed in range(40):
        torch.manual_seed(seed)
        masked, _ = net.spectra(heard)
        torch.manual_seed(seed)
        assert torch.equal(net.spectra(heard)[0], masked)  # what the gradient cache relies on
        for row in range(3):
            sound = int(mask[row].sum())
            lost = (masked[row, :sound] == 0) & (plain[row, :sound] != 0)
            frames, bands = lost.all(1).nonzero()[:, 0].tolist(), lost.all(0).nonzero()[:, 0].tolist()
            for gone, most in ((frames, sound), (bands, 16)):
                assert gone == list(range(gone[0], gone[-1] + 1)) if gone else True
                assert len(gone) <= 0.5 * most + 1
            kept = ~(lost.all(1)[:, None] | lost.all(0))
            assert torch.equal(masked[row, :sound][kept], plain[row, :sound][kept])
            pieces.append((len(frames), len(bands)))
    assert len({f for f, _ in pieces}) > 10 and len({b for _, b in pieces}) > 5


def test_settings_that_cannot_be_used_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"sample_rate": 100}, {"seconds": 0.0}, {"mels": 0}, {"width": 0}, {"layers": 0}]
    for settings in wrong:
        with pytest.raises(ConfigError, match=next(iter(settings))):
            MelConvNet.Config(**settings).build()
    sizes: dict[str, Any] = {"mels": 16, "patch": 4, "width": 24, "heads": 2}
    wrong = [{"time_mask": 1.0}, {"mel_mask": -0.1}, {"patch": 3}, {"heads": 5}]
    for settings in wrong:
        with pytest.raises(ConfigError, match=next(iter(settings))):
            MelTransformer.Config(**(sizes | settings)).build()
    with pytest.raises(ConfigError, match="freeze"):
        MelConvNet.Config(freeze=("tower",)).build()


def test_a_model_encodes_sounds_from_files(tmp_path: Path) -> None:
    config = MultiEncoder.Config(
        encoders={
            "audio": MelConvNet.Config(sample_rate=RATE, seconds=0.5, mels=16, width=24, layers=1),
            "text": BagOfWords.Config(buckets=50, width=12),
        },
        dim=6,
    )
    model: MultiEncoder = config.build()
    (tmp_path / "a.flac").write_bytes(encode(noise(0.4), "FLAC"))
    z = model.encode("audio", [tmp_path / "a.flac", (noise(0.4), RATE), encode(tone(3.0))])
    assert z.shape == (3, 6) and torch.allclose(z.norm(dim=1), torch.ones(3))
    assert torch.allclose(z[0], z[1], atol=1e-3) and not torch.allclose(z[0], z[2], atol=1e-2)
    (tmp_path / "b.wav").write_bytes(b"nothing")
    with pytest.raises(BadSample, match="b.wav"):
        model.encode("audio", [tmp_path / "b.wav"])


# -------------------------------------------------------------------------------------------- words


@torch.no_grad()
def test_a_bag_of_words_is_the_sum_of_its_words() -> None:
    torch.manual_seed(0)
    net: BagOfWords = BagOfWords.Config(buckets=40, width=5, max_words=4).build()
    made = net.transform(train=False)
    texts = ["Собака dog", "dog,собака!", "DOG", "a b c d e f", "...", "dog dog"]
    found = net(made.collate([made(t) for t in texts]))[0]
    for row, text in enumerate(texts):
        want = torch.zeros(5)
        for word in "".join(c if c.isalnum() else " " for c in text.lower()).split()[:4] or [""]:
            rows = made(word)[0].tolist()
            assert len(rows) == 2 and all(1 <= r <= 40 for r in rows)
            for place in rows:
                want = want + net.table.weight[place]
        assert torch.allclose(found[row], want, atol=1e-6)
    assert torch.allclose(found[0], found[1]) and not torch.allclose(found[0], found[2])
    assert len({tuple(made(f"word{i}")[0].tolist()) for i in range(30)}) > 25


def test_the_empty_row_of_a_bag_of_words_stays_zero() -> None:
    net: BagOfWords = BagOfWords.Config(buckets=40, width=5).build()
    made = net.transform(train=False)
    x = made.collate([made("one two three"), made("one")])
    assert x.shape == (2, 3, 2) and bool((x[1, 1:] == 0).all())
    net(x)[0].sum().backward()
    assert net.table.weight.grad is not None
    assert not bool(net.table.weight[0].any()) and not bool(net.table.weight.grad[0].any())
    assert float(net.table.weight.grad[made("two")[0, 0]].abs().sum()) > 0
    wrong: list[dict[str, Any]] = [{"buckets": 0}, {"width": 0}, {"max_words": 0}]
    for settings in wrong:
        with pytest.raises(ConfigError, match=next(iter(settings))):
            BagOfWords.Config(**settings).build()
