"""Trained byte-pair vocabularies: against Hugging Face's tokenizers, round trips, and what is refused."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from model import checkpoint, data
from model.checkpoint import load_model
from model.cli import UserError
from model.config import GPTConfig
from model.gpt import GPT
from model.tokenizer import (
    CharTokenizer,
    GPT2Tokenizer,
    Train,
    TrainedTokenizer,
    build_tokenizer,
    load_tokenizer,
    main,
    pieces,
    printable,
)

SCRIPTS = (
    "The lighthouse keeper wrote 3 letters in 1897; none of them was ever sent, and he'd kept them all.\n",
    "Смотритель маяка написал три письма, и ни одно из них не было отправлено: он хранил их в ящике стола.\n",
    "Ο φαροφύλακας έγραψε τρία γράμματα, και κανένα από αυτά δεν στάλθηκε ποτέ. Τα φύλαγε όλα.\n",  # noqa: RUF001
    "كتب حارس المنارة ثلاث رسائل ولم يرسل أيا منها قط، بل احتفظ بها كلها في درج مكتبه.\n",
    "灯台守は三通の手紙を書いたが、一通も送られることはなかった。彼はそれを机の引き出しにしまっていた。\n",
)
TEXT = "".join(SCRIPTS) * 3 + "aaaa aaaaaaa ------ ---- ....... \n\n\n   x      y 🙂🙂 👩‍🚀 naïve café\n" * 3


@pytest.fixture(scope="module")
def bpe() -> TrainedTokenizer:
    return TrainedTokenizer.build([TEXT], "420")


def hugging_face(bpe) -> Tokenizer:
    """The same vocabulary in Hugging Face's library, by the merges that we derive."""
    vocabulary = {printable(token): i for i, token in enumerate(bpe._bytes[:-1])}
    merges = [(printable(a), printable(b)) for a, b in bpe.merges()]
    theirs = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return theirs


def test_ids_equal_those_of_hugging_face(bpe):
    theirs = hugging_face(bpe)
    draw = random.Random(0)
    texts = [*SCRIPTS, TEXT, *(c * n for c in "a-. \n" for n in range(1, 40))]
    texts += ["".join(draw.choices("ab -.,\nthe é€語🙂سم", k=40)) for _ in range(300)]
    texts += ["".join(chr(draw.randrange(1, 0x3000)) for _ in range(40)) for _ in range(300)]
    for text in texts:
        assert bpe.encode(text) == theirs.encode(text).ids, text


def test_merges_of_gpt2_are_the_published_ones():
    merges = GPT2Tokenizer().merges()
    assert len(merges) == 50_000
    assert merges[:4] == [(b" ", b"t"), (b" ", b"a"), (b"h", b"e"), (b"i", b"n")]
    assert merges[-1] == (b"g", b"azed") or merges[-1][0] + merges[-1][1] == GPT2Tokenizer()._bytes[50_255]


@settings(max_examples=100)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives_the_round_trip(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_training_is_deterministic_and_independent_of_parts(bpe):
    again = TrainedTokenizer.build(pieces([TEXT[:100], TEXT[100:]]), "420")
    assert again.fields() == bpe.fields()


def test_tokens_are_readable_in_the_file(bpe, tmp_path):
    bpe.save(tmp_path)
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())["tokens"]
    assert len(tokens) == 419
    assert any(token.startswith("Ġ") and len(token) > 2 for token in tokens)
    assert load_tokenizer(tmp_path).name == "bpe:420"


def damaged(tokens, change):
    tokens = list(tokens)
    change(tokens)
    return json.dumps({"format": 1, "name": "bpe", "tokens": tokens})


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: tokens.pop(0),
        lambda tokens: tokens.append(tokens[300]),
        lambda tokens: tokens.insert(300, ""),
        lambda tokens: tokens.insert(0, tokens.pop()),
        lambda tokens: tokens.append("中"),
        lambda tokens: tokens.append(7),
        lambda tokens: tokens.append("ĠzqĠ"),
        lambda tokens: tokens.clear(),
        lambda tokens: tokens.sort(key=len, reverse=True),
    ],
    ids=["no byte", "twice", "empty", "a byte late", "no alphabet", "number", "not merged", "none", "order"],
)
def test_damaged_vocabulary_is_refused(bpe, tmp_path, change):
    (tmp_path / "tokenizer.json").write_text(damaged(bpe.fields()["tokens"], change))
    with pytest.raises(UserError, match="damaged or not one of ours"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("size", ["", "x", "0", "256", "-300", "3.5", "1e4", "99999999", "²"])
def test_size_out_of_range_is_refused(size):
    with pytest.raises(UserError, match="from 257 to"):
        build_tokenizer(f"bpe:{size}", [TEXT])


def test_size_beyond_the_text_names_the_largest():
    with pytest.raises(UserError, match=r"has pairs for (\d+) ids only: give bpe:\1"):
        build_tokenizer("bpe:5000", ["ab ab ab"])


def test_vocabulary_comes_from_the_training_part(tmp_path):
    (tmp_path / "a.txt").write_text("low lower lowest " * 100 + "zzqqxx" * 30)  # the last tenth is validation
    made = data.prepare(tmp_path / "a.txt", tmp_path / "tokens", "bpe:262")
    assert not any(b"q" in token or b"z" in token for token in made.tokenizer._bytes[256:])
    assert made.tokenizer.decode(made.val[:]).endswith("zzqqxx")
    assert made.tokenizer.decode(made.train[:]) + made.tokenizer.decode(made.val[:]) == (tmp_path / "a.txt").read_text()


def test_token_folder_is_used_by_name_and_by_path(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    made = data.prepare(tmp_path / "a.txt", tmp_path / "tokens", "bpe:300")
    TrainedTokenizer.build(["other text, other pairs, " * 9], "270").save(tmp_path / "other")
    for i, name in enumerate(["bpe:300", str(tmp_path / "tokens"), str(tmp_path / "tokens" / "tokenizer.json")]):
        opened = data.open_source(tmp_path / "tokens", tmp_path / f"run{i}", name)
        assert opened.train[:].tolist() == made.train[:].tolist()
    for name in ("bpe:301", "char", str(tmp_path / "other")):
        with pytest.raises(UserError, match=r"was made with --tokenizer bpe:300"):
            data.open_source(tmp_path / "tokens", tmp_path / "run", name)


def test_command_trains_a_vocabulary(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    main(Train((tmp_path / "a.txt",), 300, tmp_path / "vocabulary"))
    assert f"--tokenizer {tmp_path / 'vocabulary'}" in capsys.readouterr().out
    again = data.prepare(tmp_path / "a.txt", tmp_path / "tokens", str(tmp_path / "vocabulary"))
    assert again.tokenizer.n_vocab == 300
    with pytest.raises(UserError, match="holds a tokenizer already"):
        main(Train((tmp_path / "a.txt",), 300, tmp_path / "vocabulary"))
    with pytest.raises(UserError, match="at least one text file"):
        main(Train((), 300, tmp_path / "second"))


def test_another_models_tokenizer_is_refused(tmp_path, bpe):
    config = GPTConfig(vocab_size=420, n_positions=8, n_layer=1, n_head=1, n_embd=8)
    parts = {"model": dict(GPT(config).state_dict())}
    checkpoint.save(tmp_path, 1, parts, config={}, model=config, best_val_loss=None, elapsed_s=0.0)
    bpe.save(tmp_path / "tokenizer")
    bpe.save(tmp_path / "data")
    assert load_model(tmp_path)[1].name == "bpe:420"
    other = TrainedTokenizer.build([TEXT[::-1]], "420")
    other.save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="not the tokenizer of this model: it differs from"):
        load_model(tmp_path)
    CharTokenizer("abc").save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="it has 4 ids, and the model 420"):
        load_model(tmp_path)
