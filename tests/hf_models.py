"""Small transformers models in folders, as the hub has large ones: audio towers with their extractors, text models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

RATE = 8000


def _shuffled(model: Any) -> Any:
    """Statistics of batch norms and gains as training leaves them, not as they start."""
    generator = torch.Generator().manual_seed(1)
    for name, t in model.state_dict().items():
        if t.is_floating_point() and t.ndim == 1:
            low = 0.5 if name.endswith(("weight", "running_var")) else -0.2
            t.copy_(low + torch.rand(t.shape, generator=generator))
    return model


def clap(folder: Path, *, fusion: bool = False) -> str:
    """CLAP with both towers, two seconds at 8 kHz."""
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    audio: dict[str, Any] = {
        "spec_size": 64,
        "num_mel_bins": 16,
        "window_size": 4,
        "patch_size": 4,
        "patch_stride": [4, 4],
        "patch_embeds_hidden_size": 8,
        "hidden_size": 16,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "enable_fusion": fusion,
        "aff_block_r": 2,
        "projection_dim": 12,
    }
    text: dict[str, Any] = {
        "vocab_size": 30_522,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "projection_dim": 12,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    model = _shuffled(ClapModel(ClapConfig(audio_config=audio, text_config=text, projection_dim=12)))
    model.save_pretrained(folder)
    ClapFeatureExtractor(
        feature_size=16,
        sampling_rate=RATE,
        hop_length=80,
        max_length_s=2,
        fft_window_size=256,
        frequency_max=4000,
        truncation="fusion" if fusion else "rand_trunc",
    ).save_pretrained(folder)
    return str(folder)


def whisper(folder: Path) -> str:
    """Whisper of two seconds at 8 kHz."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

    sizes: dict[str, Any] = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=100,
        num_mel_bins=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
        max_source_positions=100,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **sizes,
    )
    _shuffled(WhisperModel(config)).save_pretrained(folder)
    WhisperFeatureExtractor(
        feature_size=16, sampling_rate=RATE, hop_length=80, chunk_length=2, n_fft=256
    ).save_pretrained(folder)
    return str(folder)


def ast(folder: Path) -> str:
    """An audio spectrogram transformer of 1.28 seconds at 8 kHz."""
    from transformers import ASTConfig, ASTFeatureExtractor, ASTModel

    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_length=128,
        num_mel_bins=32,
    )
    _shuffled(ASTModel(config)).save_pretrained(folder)
    ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=32, max_length=128).save_pretrained(folder)
    return str(folder)


def wav2vec2(folder: Path, *, norm: str = "layer") -> str:
    """wav2vec 2.0; `norm` "group" as the base model has it, "layer" as the large one."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8, 8),
        conv_stride=(5, 4, 4),
        conv_kernel=(10, 4, 4),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        mask_time_prob=0.5,
        layerdrop=0.5,
    )
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=RATE, do_normalize=True, return_attention_mask=norm == "layer"
    ).save_pretrained(folder)
    return str(folder)


def _tokenizer(folder: Path, **special: str) -> int:
    """A Unigram tokenizer of several scripts, as mT5 and XLM-R have them; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    texts = [
        "a photo of a red square",
        "собака лает во дворе",
        "犬が庭で吠えている",
        "ein rotes Quadrat",
        "un carré rouge",
    ]
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts * 5, trainer)
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def t5(folder: Path) -> str:
    """An encoder-decoder with relative positions and a multilingual vocabulary."""
    from transformers import T5Config, T5Model

    size = _tokenizer(folder, end="</s>")
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    T5Model(config).save_pretrained(folder)
    return str(folder)


def bart(folder: Path) -> str:
    """An encoder-decoder with learned positions, 20 of them, which drops layers in training."""
    from transformers import BartConfig, BartModel

    size = _tokenizer(folder, end="</s>")
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=size,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=20,
        encoder_layerdrop=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )
    BartModel(config).save_pretrained(folder)
    return str(folder)


def gpt2(folder: Path) -> str:
    """A decoder whose tokenizer ends no text and pads none."""
    from transformers import GPT2Config, GPT2Model

    size = _tokenizer(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=1, eos_token_id=1)
    GPT2Model(config).save_pretrained(folder)
    return str(folder)


def clip(folder: Path) -> str:
    """CLIP with its own vocabulary of 50 letters, of which the end of text is the last."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

    letters = {chr(97 + i): i for i in range(26)}
    tokenizer = Tokenizer(models.WordLevel(letters | {"<unk>": 26, "<start>": 48, "<end>": 49}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 48), ("<end>", 49)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>", unk_token="<unk>"
    ).save_pretrained(folder)
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=sizes
        | {
            "vocab_size": 50,
            "max_position_embeddings": 12,
            "bos_token_id": 48,
            "eos_token_id": 49,
            "pad_token_id": 49,
        },
        vision_config=sizes | {"image_size": 16, "patch_size": 8},
        projection_dim=12,
    )
    CLIPModel(config).save_pretrained(folder)
    return str(folder)
