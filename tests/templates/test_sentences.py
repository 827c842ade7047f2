"""How the app cuts text into sentences, and joins translations: the table in docs/languages.md."""

import os
import re
import unicodedata
from types import SimpleNamespace

import pytest
import template_ray_serve as app
from helpers.repository import ROOT
from sentencex import segment
from serve_testing import assert_linear

PAGE = ROOT / "docs/languages.md"
MARKS = ("<!-- sentences: begin -->\n", "<!-- sentences: end -->")

# {language: (its code as a setting, lines with " | " where a sentence ends)}
LINES = {
    "English": (
        "en",
        "Prof. Smith met Sen. Lee in No. 5. | He left.",
        "1. Wash the rice. | 2. Boil it.",
        'He said "No." | Then he left…',
        "See http://a.b/c?d=e.f for more. | It costs 3.50 dollars. | OK!",
        "Hello!|How are you?",
        "Dr. J. R. R. Tolkien lived in the U.K. and wrote. | So do I. | We met.",
        "Wait... what? | Yes.",
        "It opens at 9 a.m. on Monday. | Come early!!! | 😀",
        "hi. | how are you?",
        "Mr. and Mrs. Brown arrived at 5 p.m. | They were late.",
        "The U.S. Senate voted. | It passed 51–49.",
        "Section 3.2 applies (see Fig. 4). | Thanks!",
        "“Why?” she asked. | “Because,” he said.",
        "I was born in 1990. | My brother in 1992.",
        "Is it I? | No. | It is me.",
        "a) Open the box. | b) Close it.",
        "Ph.D. students, e.g. Anna, work for Google Inc. | She likes it.",
        "Acme Inc. USA is expanding. | It hires.",
        "Martin Luther King Jr. Day is a holiday. | Banks close.",
        "Yan et al. [2004] analysed it. | They agreed.",
    ),
    "German": (
        "deu_Latn",
        "Am 13. Oktober kostet es ca. 5 Mio. Euro. | Gut.",
        "Das ist z. B. in Nr. 7 so. | Dr. Meier weiß es.",
        "„Komm her!“, rief er. | Sie kam.",
        "Der 2. Platz ging an Fr. Groß. | Bravo!",
        "Er kam um 8.30 Uhr. | Alle schliefen.",
        "Der 1. FC Köln gewann 3:1. | Toll!",
        "Vgl. S. 5 ff. und Abb. 3. | Ende.",
        "Es war im Jahr 1990. | Dann kam er.",
        "Ludwig XIV. war König. | Er starb 1715.",
    ),
    "French": (
        "fr_XX",
        "J'ai vu M. Dupont hier. | Il va bien.",
        "« Viens ! » dit-il. | Elle vint.",
        "Où ? | Là ! | Voir p. 12, etc.",
        "Le prix est de 3,50 €. | C'est cher…",
        "Mme Curie est née en 1867. | Elle est célèbre.",
        "L'art. 5 s'applique. | Cf. p. 3.",
        "« Bonjour ! » | « Salut. »",
        "Il a 20 ans. | Elle en a 21.",
    ),
    "Spanish": (
        "spa_Latn",
        "¿Cómo estás? | ¡Bien!",
        "El Sr. García vive en EE. UU. desde 2010. | Sí.",
        "La Dra. Ruiz llegó a las 3 p. m. a casa. | Vale.",
        "La Av. Central está cerca. | ¿La ves?",
        "Dijo: «Sí». | Y se fue.",
    ),
    "Italian": (
        "it_IT",
        "Il sig. Rossi è qui. | Il dott. Bianchi no.",
        "Che ore sono? | Le 8.30!",
        "Abita in via Roma n. 5. | Bello!",
        "Il prof. Bianchi insegna. | Sì.",
    ),
    "Polish": (
        "pol_Latn",
        "W 1990 r. było źle. | Teraz jest np. dobrze.",
        "Prof. Nowak mieszka przy ul. Długiej. | Tak.",
        "Mieszka tu ok. 5 lat. | Ładnie.",
        "Jest godz. 8.30. | Wstawaj!",
    ),
    "Czech": (
        "cs_CZ",
        "Přišel 5. října. | Ano.",
        "Kde je Dr. Novák? | Tady.",
    ),
    "Dutch": (
        "nl_XX",
        "Dat is o.a. goed. | Ja.",
        "Dhr. Jansen woont hier. | Mooi!",
        "Het kost ca. 5 mln. euro. | Ja.",
    ),
    "Turkish": (
        "tr",
        "Dr. Ahmet 3. katta oturuyor. | Evet.",
        "Nasılsın? | İyiyim!",
        "Saat 8.30'da geldi. | Tamam.",
        "Prof. Yılmaz burada. | Evet.",
    ),
    "Russian": (
        "ru_RU",
        "Он живёт на ул. Ленина, д. 5. | Это г. Москва.",
        "А. С. Пушкин родился в 1799 г. в Москве. | Да.",
        "— Кто там? | — Это я!",
        "Это стоит 5 тыс. руб. в месяц. | Дорого!",
        "«Привет!» — сказал он. | Она ушла.",
        "и т. д. и т. п. | Конец.",
    ),
    "Greek": (
        "ell_Grek",
        "Πώς είσαι; | Καλά.",
        "Ο κ. Παπαδόπουλος ήρθε. | Ναι!",
        "Κοστίζει 3,50 ευρώ. | Πού πας; | Σπίτι.",
        "Ήρθε στις 8.30 π.μ. σήμερα. | Ωραία!",
    ),
    "Chinese": (
        "zho_Hans",
        "我有书！！|你要水。",
        "他说：“你好。”然后走了。|她笑了。",
        "价格是3.5元。|好的……再见！",
        "你好吗？|我很好。|“谢谢！”|“不客气。”",
        "请看 https://a.b/c?d=e 。|谢谢。",
        "他问：“你去吗？”|“不去。”",
        "今天天气很好,我们去公园吧。|好的!",
        "《你好，李焕英。》是电影。|好看。",
        "这是第一章。（完）|下一章。",
    ),
    "Japanese": (
        "ja_XX",
        "これは「本当ですか？」と彼は言った。|はい。",
        "彼は「はい。」と言った。|猫がいる！|犬もいる。",
        "値段は3.5円です。|高い？|いいえ。",
        "「元気？」|「うん。」",
        "今日は3月5日です。|明日は？|晴れ。",
        "彼は笑った（とても）。|終わり。",
        "「行く？」「行かない。」と彼女。",
        "映画『君の名は。』を見ました。|はい。",
        "【重要！】お知らせ。",
    ),
    "Korean": (
        "kor_Hang",
        "안녕하세요. | 반갑습니다!",
        "2024. 5. 3.에 만나요. | 네.",
        "값은 3.5원이다. | 좋다.",
        "“정말요?” | “네.”",
        "그는 갔다. | 나는 남았다.",
    ),
    "Arabic": (
        "arb_Arab",
        "هل أنت بخير؟ | نعم، أنا بخير.",
        "وصل د. أحمد اليوم. | مرحبا!",
        "السعر 3.5 دولار. | شكرا.",
        "قال: «نعم». | ثم ذهب.",
        "كم الساعة؟ | الثالثة!",
    ),
    "Persian": (
        "fa_IR",
        "حال شما چطور است؟ | خوبم.",
        "او آمد. | من رفتم!",
    ),
    "Urdu": (
        "ur_PK",
        "وہ آیا۔ | وہ گیا۔",
        "کیا حال ہے؟ | ٹھیک ہے۔",
    ),
    "Hebrew": (
        "heb_Hebr",
        "שלום! | מה שלומך?",
        'ד"ר כהן הגיע. | כן.',
        "המחיר הוא 3.5 שקלים. | טוב…",
        "לאן אתה הולך? | הביתה.",
    ),
    "Hindi": (
        "hin_Deva",
        "वह आया। | वह गया।",
        "डॉ. शर्मा आए। | क्या हुआ?",
        "कीमत 3.5 रुपये है। | अच्छा!",
        "क्या आप ठीक हैं? | हाँ।",
        'राम ने कहा, "चलो।" | सब चले गए।',
    ),
    "Tamil": (
        "tam_Taml",
        "அவன் வந்தான். | அவள் போனாள்.",
        "எப்படி இருக்கிறாய்? | நலம்!",
    ),
    "Thai": (
        "tha_Thai",
        "ราคา 3.5 บาท",
        "คุณสบายดีไหม? | สบายดี!",
        "เขามาแล้ว! | ดีมาก",
    ),
    "Khmer": (
        "khm_Khmr",
        "គាត់មក។ | នាងទៅ។",
        "តើអ្នកសុខសប្បាយទេ? | បាទ។",
    ),
    "Burmese": (
        "mya_Mymr",
        "သူလာတယ်။ | သူမသွားတယ်။",
    ),
    "Armenian": (
        "hye_Armn",
        "Նա եկավ։ | Նա գնաց։",
    ),
    "Amharic": (
        "amh_Ethi",
        "ሰላም። | እንዴት ነህ? | ደህና ነኝ።",
        "ዶ/ር አበበ መጣ። | እሺ።",
        "ስሙ ማን ነው? | አበበ ይባላል።",
    ),
    "Portuguese": (
        "pt_XX",
        "O Dr. Silva chegou às 8h. | Tudo bem?",
        "Custa R$ 3,50. | Caro!",
        "O total, aprox. 500 reais, foi pago ontem. | Ótimo!",
    ),
    "Swedish": (
        "sv_SE",
        "Han kom kl. 8. | Bra!",
        "Det kostar t.ex. 5 kr. | Ja.",
    ),
    "Vietnamese": (
        "vie_Latn",
        "Anh ấy đến. | Tôi đi!",
    ),
    "Ukrainian": (
        "ukr_Cyrl",
        "Він живе на вул. Шевченка. | Так.",
    ),
    "Bulgarian": (
        "bul_Cyrl",
        "Роден е през 1990 г. в София. | Добре.",
        "Живее на ул. Раковски 5. | Да.",
    ),
    "Danish": (
        "dan_Latn",
        "Det koster f.eks. 5 kr. i dag. | Godt.",
        "Han kom d. 5. maj. | Alle var glade.",
    ),
    "Finnish": (
        "fin_Latn",
        "Hän tuli esim. klo 8.30. | Kaikki nukkuivat.",
        "Nähdään 5. toukokuuta. | Hyvä!",
    ),
    "Hungarian": (
        "hun_Latn",
        "Dr. Kovács 2020. május 5-én jött. | Igen.",
        "A Kő Kft. vezetője hívott. | Jó.",
        "2024. 05. 03-án jött. | Igen.",
    ),
    "Croatian": (
        "hrv_Latn",
        "Rođen je 1990. godine. | To je 2. Svjetski rat.",
        "Došao je npr. jučer. | Soba ima TV. | Da.",
    ),
    "Latvian": (
        "lvs_Latn",
        "Viņš dzimis 1990. gadā. | Jā.",
        "– Vai tu nāksi? – viņa jautāja. | – Jā!",
    ),
    "Romanian": (
        "ron_Latn",
        "Dl. Popescu locuiește pe str. Lungă nr. 5. | Da.",
        "Sunt 5 km. | Mergem.",
    ),
    "Indonesian": (
        "ind_Latn",
        "Rapat dimulai pk. 14.30 dan berakhir sore. | Semua senang.",
        "Dia lahir tgl. 15 Mei di Surabaya. | Benar.",
        "PT. Telkom hadir. | Bagus!",
    ),
    "Bengali": (
        "ben_Beng",
        "লে. কর্নেল (অব.) আবু ওসমান চৌধুরী এলেন। | সবাই খুশি।",
        "সে এল। | সে গেল।",
    ),
}

# (target, source, translations, the answer)
JOINS = [
    ("fr", "One. Two.", ["Un.", "Deux."], "Un. Deux."),
    ("zh", "One. Two.", ["一。", "二。"], "一。二。"),
    ("zho_Hant", "One  two. \n Three", ["一 二", "三"], "一 二 \n 三"),
    ("zh_CN", "Hello! Bye", ["你好", "再见"], "你好再见"),
    ("__jpn__", "One. Two.", ["一。", "二。"], "一。二。"),
    ("ja_XX", "One. Two? Three!", ["一。", "二？", "三！"], "一。二？三！"),
    ("", "One. Two.", ["一。", "二。"], "一。二。"),
    (
        "en",
        "我有书！！你要水。",
        ["I have a book!", "You need water."],
        "I have a book! You need water.",
    ),
    (
        "en",
        "他来了。　她走了。\n好。",
        ["He came.", "She left.", "Good."],
        "He came. She left.\nGood.",
    ),
    ("th", "One. Two.", ["หนึ่ง", "สอง"], "หนึ่ง สอง"),
    (
        "ko_KR",
        "猫がいる。犬もいる。",
        ["고양이가 있다.", "개도 있다."],
        "고양이가 있다. 개도 있다.",
    ),
    (
        "ar",
        "One.\r\n\tTwo.\u2028- Three.",
        ["واحد.", "اثنان.", "- ثلاثة."],
        "واحد.\r\n\tاثنان.\u2028- ثلاثة.",
    ),
    ("he", "Hello! 😀 Bye.", ["שלום!", "😀 ביי."], "שלום! 😀 ביי."),
    ("de", "  One. \n\n * * * \n\nTwo.  ", ["Eins.", "Zwei."], "  Eins. \n\n * * * \n\nZwei.  "),
]

# The expression of release 0.1.0.
GAPS = re.compile(
    r"""(^\s+|(?<!\s)\s+$|(?<!\s)\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*|(?<=[。！？])
    |(?:(?<=[.!?…])|(?<=[.!?…]["'»”’)]))(?<!\b\w\.)(?<!\b(?:Mr|Ms|Dr|St|vs)\.)(?<!\b(?:Mrs|e\.g|i\.e)\.)\s+(?![a-z\s]))""",
    re.VERBOSE,
)


def splitter(language):
    """Return a model that only cuts text: a token is a character."""
    model = app.Model.__new__(app.Model)
    model.language = app.two_letters(language)
    model.max_sentence_tokens = 1_000_000
    model.encode = list
    model.frame = 0
    model.tokenizer = SimpleNamespace(unk_token_id=None)
    return model


def cut(language, text):
    return ["".join(sentence.tokens) for sentence in splitter(language).sentences(0, text)]


def cut_by_release_0_1_0(_, text):
    return [part for part in GAPS.split(text)[::2] if part and not app.is_blank(part)]


def cut_by_sentencex(language, text):
    parts = [part.strip() for part in segment(app.two_letters(language), text)]
    return [part for part in parts if part]


def right_cut(line):
    """Return (text, sentences) of a line; "|" without spaces stands where there is no space."""
    text = line.replace(" | ", " ").replace("|", "")
    sentences = [part.strip() for part in line.split("|")]
    return text, [part for part in sentences if app.has_words(part)]


def texts():
    for code, *lines in LINES.values():
        for line in lines:
            yield code, *right_cut(line)


def table():
    """Return the table of the page as lines of Markdown."""
    ways = (cut_by_release_0_1_0, cut_by_sentencex, cut)
    rows = [
        "| language | lines | release 0.1.0 | `sentencex` alone | now |",
        "|---|---|---|---|---|",
    ]
    sums = [0, 0, 0, 0]
    wrong = []
    for name, (code, *lines) in LINES.items():
        counts = [len(lines)]
        for way in ways:
            counts.append(sum(way(code, text) == right for text, right in map(right_cut, lines)))
        rows.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
        sums = [total + count for total, count in zip(sums, counts)]
        for text, right in map(right_cut, lines):
            if cut(code, text) != right:
                wrong.append(f"- {name}: {' ‖ '.join(cut(code, text))}")
    rows.append("| **all** | " + " | ".join(map(str, sums)) + " |")
    return "\n".join([*rows, "", "Still cut otherwise than a reader would:", "", *wrong, ""])


def test_the_table_of_the_page_is_right():
    begin, end = MARKS
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(begin)
    found, _, after = rest.partition(end)
    if os.environ.get("WRITE_TABLES"):
        PAGE.write_text(before + begin + "\n" + table() + "\n" + end + after, "utf-8")
    else:
        assert found.strip() == table().strip(), "WRITE_TABLES=1 pytest ... writes it"


@pytest.mark.parametrize("language", LINES)
def test_sentences_are_lossless(language):
    code, *lines = LINES[language]
    model = splitter(code)
    shown = [right_cut(line)[0] for line in lines]
    for text in [
        *shown,
        "\n".join(shown),
        "\r\n\t".join(shown),
        " \u2028".join(shown),
        "".join(shown),
    ]:
        assert "".join(model.pieces(text)) == text
        whole = ""
        for sentence in model.sentences(0, text):
            assert app.has_words("".join(sentence.tokens))
            whole += sentence.before + "".join(sentence.tokens) + sentence.after
        assert whole == text


def test_most_lines_are_cut_as_a_reader_would():
    right = sum(cut(code, text) == sentences for code, text, sentences in texts())
    old = sum(cut_by_release_0_1_0(code, text) == sentences for code, text, sentences in texts())
    lines = len(list(texts()))
    assert right > 0.9 * lines
    assert old < 0.6 * lines < 0.9 * right


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "...",
        "！",
        "😀 !!",
        "\n- - -\n",
        "\u200b",
        "* * *",
        "»?«",
        "\u0000\u0007\u001b",
        "\u3164",  # Hangul fillers are letters to Unicode
        "\u115f\u1160 \uffa0",
        "\u2800",  # the blank of Braille
        "👨\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 👍🏽 ❤\ufe0f 🇫🇷🇩🇪",
        "1\ufe0f\u20e3 #\ufe0f\u20e3 2\u20e3",  # keycaps
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    ],
)
def test_what_has_no_letter_or_digit_never_reaches_the_model(text):
    assert splitter("en").sentences(0, text) == []
    request = app.ModelRequest(text=["Yes.", text])
    model = splitter("en")
    model.spaces = True
    (only,) = model.sentences(0, "Yes.")
    answer = model.answer(request, [only], [app.Output("Oui.", 2, False)])
    expected = "" if app.is_blank(text) else text
    assert answer.translation == ["Oui.", expected]


def test_a_letter_beside_what_is_none_is_text():
    for text in ("\u1100\u1160", "1\ufe0f\u20e3 a", "12", "\u28002"):
        assert app.has_words(text), ascii(text)


# Text with characters that are not shown; "|" is where a sentence ends.
MARKED = [
    ("en", "The house is won\u00adder\u00adful. | \ufeffHello\u2060 world!\u200e | Thank you."),
    ("en", "\u200e1. Wash the rice. | \u200e2. Boil it."),
    ("heb_Hebr", "שלום.\u200f | מה שלומך?\u200f | כן."),
    ("heb_Hebr", "\u202bשלום. | מה שלומך?\u202c"),
    ("arb_Arab", "وصل أحمد.\u200f | شكرا!"),
    ("arb_Arab", "وصل أحمد.\u061c | شكرا!"),
    ("fa_IR", "\u2067او آمد.\u2069 | من رفتم!"),
    ("fa_IR", "او می\u200cرود. | من رفتم!"),
]


@pytest.mark.parametrize("language, line", MARKED)
def test_what_is_not_shown_ends_no_sentence_and_reaches_no_model(language, line):
    shown = ""
    for character in line:
        if unicodedata.category(character) != "Cf" or character == "\u200c":  # as in the last line
            shown += character
    _, right = right_cut(shown)
    text, _ = right_cut(line)
    model = splitter(language)
    model.max_request_tokens = 1000
    inputs = model.plan(app.ModelRequest(text=text))
    assert ["".join(sentence.tokens) for sentence in inputs] == right
    assert "".join(model.pieces(text)) == text


def test_no_emoji_is_cut():
    text = "I came! 👨\u200d👩\u200d👧\u200d👦❤\ufe0f You left. 🇫🇷🇩🇪 Bye!"
    right = ["I came!", "👨\u200d👩\u200d👧\u200d👦❤\ufe0f You left.", "🇫🇷🇩🇪 Bye!"]
    assert cut("en", text) == right


@pytest.mark.parametrize("target, source, translations, answer", JOINS)
def test_translations_are_joined_as_the_target_language_writes(
    target, source, translations, answer
):
    language = "zh" if re.search("[\u3040-\u9fff]", source) else "en"
    model = splitter(language)
    model.spaces = app.two_letters(target) not in app.UNSPACED
    inputs = model.sentences(0, source)
    assert len(inputs) == len(translations)
    outputs = [app.Output(translation, 1, False) for translation in translations]
    assert model.answer(app.ModelRequest(text=source), inputs, outputs).translation == answer


@pytest.mark.parametrize(
    "filler", ["1. ", "«", "M. ", "a. ", "ab. c", "「。」", "」あ", "; ", "។ "]
)
def test_putting_sentences_together_is_quick(filler):
    assert_linear(splitter("el").pieces, filler * (10_000 // len(filler)))
