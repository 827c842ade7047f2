"""The split sees a sentence in any Unicode form, and different sentences as different."""

import unicodedata

import pytest
import template_flow as flow

SENTENCES = [
    "Ça va très bien, l'été à Noël ?",
    "नमस्ते दुनिया, कैसे हैं आप",
    "สวัสดีชาวโลก ฉันรักคุณ",
    "مرحبا بالعالم يا صديقي",
    "我有书，你要水。",
    "Straße und Größe",
    "Ελληνικά ΣΑΣ",
    "한국어 문장입니다",
    "ガギグゲゴ パピプペポ",
    "שלום עולם",
    "ﬁne ½ cup",
    "❤️",
    "!?",
]
UNSEEN = {
    "soft hyphen": "\u00ad",
    "joiner": "\u200d",
    "non-joiner": "\u200c",
    "zero-width space": "\u200b",
    "byte order mark": "\ufeff",
    "left to right": "\u200e",
    "embedding": "\u202a",
    "isolate": "\u2066",
    "word joiner": "\u2060",
    "variation selector": "\ufe0f",
    "ideographic variation": "\U000e0100",
    "Mongolian variation": "\u180b",
    "grapheme joiner": "\u034f",
    "Hangul filler": "\u115f",
    "Khmer vowel": "\u17b4",
}
# Pairs that differ in one vowel sign, letter, mark or picture.
DISTINCT = """कि की कु के क ก กา กี่ กิน กัน กิ่ง ب ت ث كتب كتاب 👍 👎 👍🏽 ❤ 😀 😁 ! ? !? ... é e è ê か が
は ば ぱ ⠓ ⠑ א ב 한 글 ሀ ለ 1 2 ½ $ € + - → ← ক কি""".split()


def key(text):
    return flow.key((text, "target"))


@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
@pytest.mark.parametrize("sentence", SENTENCES)
def test_every_unicode_form_has_one_key(sentence, form):
    assert key(unicodedata.normalize(form, sentence)) == key(sentence)


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("sentence", SENTENCES)
def test_format_characters_do_not_count(sentence, name):
    character = UNSEEN[name]
    for form in ("NFC", "NFD"):
        text = unicodedata.normalize(form, sentence)
        assert key(character + text) == key(sentence)
        assert key(character.join(text)) == key(sentence)


@pytest.mark.parametrize("sentence", SENTENCES)
def test_case_and_width_do_not_count(sentence):
    wide = "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in sentence)
    for text in (sentence.upper(), sentence.lower(), sentence.title(), wide, f" {sentence} "):
        assert key(text) == key(sentence)


def test_different_texts_have_different_keys():
    assert len(set(map(key, DISTINCT))) == len(DISTINCT)
    assert "" not in map(key, [*DISTINCT, "\u200b", "\u00ad", " "])


def test_no_held_out_sentence_is_trained_on_in_another_form():
    texts = [f"{sentence} {number}" for sentence in SENTENCES[:11] for number in range(20)]
    changes = [
        lambda text: unicodedata.normalize("NFD", text),
        lambda text: "\u00ad".join(text),
        str.upper,
    ]
    pairs = [(text, "a") for text in texts]
    # The same source with another target is the same sentence, too.
    pairs += [(change(text), "b") for change in changes for text in texts]
    training, held_out = flow.split(pairs)
    assert len(training) + len(held_out) == len(pairs)
    assert {key(text) for text, _ in training}.isdisjoint(key(text) for text, _ in held_out)
    assert len({key(text) for text in texts}) == len(texts)
    assert 0.04 < len(held_out) / len(pairs) < 0.25
