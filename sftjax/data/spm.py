"""Builds a fast tokenizer from a SentencePiece model file, with the ids that SentencePiece itself gives.

Where the usual conversions differ from SentencePiece, and what is done here:
  * leading blanks: SentencePiece puts its dummy prefix in front of them as well, the Metaspace pre-tokenizer doesn't;
    so the prefix is a *normalizer* (as in Llama-2's own tokenizer.json, one prefix for each stretch between control
    tokens, which is what Meta's code gives by encoding each turn by itself);
  * merges are ordered by score, since the order of ids is not that of scores in every model;
  * pieces of type UNUSED are never produced; unigram control pieces neither.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

from sftjax.errors import ConfigError

_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5
MAX_FILE_BYTES = 64 * 2**20  # the largest in use has 5 MB


def build(path: Path, *, add_bos: bool | None = None) -> tuple[Tokenizer, dict[str, str]]:
    """Reads `tokenizer.model`.

    Args:
      path: the model file (BPE or unigram).
      add_bos: whether plain text gets a BOS in front; None: if the model has one.

    Returns:
      The tokenizer, and the names of its special tokens by role ("bos_token", ...).
    """
    proto = _parse(path)
    pieces, trainer = proto.pieces, proto.trainer_spec
    if trainer.model_type not in (_UNIGRAM, _BPE):
        raise ConfigError(f"{path}: a SentencePiece model of words or characters; only BPE and unigram can be used")
    if trainer.treat_whitespace_as_suffix:
        raise ConfigError(f"{path}: SentencePiece with blanks as suffixes is not supported")
    if trainer.model_type == _BPE:
        model = models.BPE(
            {piece.piece: i for i, piece in enumerate(pieces)},
            _merges(pieces),
            unk_token=pieces[trainer.unk_id].piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    else:
        vocabulary = [
            (f"\U0010fffe{i}" if piece.type == _UNUSED else piece.piece, piece.score) for i, piece in enumerate(pieces)
        ]
        model = models.Unigram(vocabulary, trainer.unk_id, trainer.byte_fallback)
    tokenizer = Tokenizer(model)
    if steps := _normalizers(proto.normalizer_spec):
        tokenizer.normalizer = normalizers.Sequence(steps)
    prefix = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *prefix]
    )
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != _USER_DEFINED)
            for piece in pieces
            if piece.type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    names = {}
    for role in ("unk", "bos", "eos", "pad"):
        number = getattr(trainer, f"{role}_id")
        if 0 <= number < len(pieces):
            names[f"{role}_token"] = pieces[number].piece
    if "bos_token" in names and add_bos is not False:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos}:0 $A:0", special_tokens=[(bos, trainer.bos_id)]
        )
    return tokenizer, names


def _parse(path: Path):
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: {path.stat().st_size:,} bytes is more than any SentencePiece model has")
    content = path.read_bytes()
    try:
        proto = sentencepiece_model_pb2.ModelProto()
        proto.ParseFromString(content)
        SentencePieceProcessor(model_proto=content)  # checks what the message format doesn't
        if not proto.pieces or not 0 <= proto.trainer_spec.unk_id < len(proto.pieces):
            raise ValueError("no pieces, or no unknown piece")
    except Exception as error:  # protobuf and the C++ side raise several kinds
        raise ConfigError(f"{path} is not a SentencePiece model, or is damaged: fetch it again ({error})") from None
    return proto


def _merges(pieces) -> list[tuple[str, str]]:
    """All pairs that join to a piece, best score first; pairs of one piece by the ids of left and right."""
    usable = {p.piece: (p.score, i) for i, p in enumerate(pieces) if p.type not in (_UNKNOWN, _CONTROL, _UNUSED, 6)}
    merges = []
    for piece, (score, _) in usable.items():
        for cut in range(1, len(piece)):
            left, right = usable.get(piece[:cut]), usable.get(piece[cut:])
            if left is not None and right is not None:
                merges.append((-score, left[1], right[1], piece[:cut], piece[cut:]))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _normalizers(spec) -> list:
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    return steps
