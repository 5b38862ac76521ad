"""The texts that tokenizers are compared on: languages, digits, code, white space, special tokens, and every odd byte we could think of."""

LANGUAGES = """\
The quick brown fox jumps over the lazy dog.
Don't you'll we've I'm he'd they're it's — she said: "no-one's here".
El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia y frío; añoraba a su querido cachorro.
Portez ce vieux whisky au juge blond qui fume, où l'œuvre naïve s'achève à Noël.
Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.
Pchnąć w tę łódź jeża lub ośm skrzyń fig.
Příliš žluťoučký kůň úpěl ďábelské ódy.
Съешь же ещё этих мягких французских булок, да выпей чаю.
Жебракують філософи при ґанку церкви в Гадячі, ще й шатро їхнє п'яне знаємо.
Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.
דג סקרן שט בים מאוכזב ולפתע מצא חברה
نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر ومغلف بجلد أزرق
اَلْعَرَبِيَّةُ بِالتَّشْكِيلِ
یک متن فارسی با نیم‌فاصله و عدد ۱۲۳۴
ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले विष्णुवतार भगवान श्रीराम
আমি কাচ খেতে পারি, তাতে আমার কোনো ক্ষতি হয় না।
யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்
เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน
Trăm năm trong cõi người ta, chữ tài chữ mệnh khéo là ghét nhau.
天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。
繁體中文與简体中文混在一起，還有標點「引號」。
いろはにほへと ちりぬるを 我が世誰ぞ 常ならむ
カタカナ ﾊﾝｶｸ ひらがな 漢字、そして　全角スペース
키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.
გთხოვთ ახლავე გაიაროთ რეგისტრაცია
Կրնամ ապակի ուտել և ինծի անհանգիստ չըներ։
ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ
ዕብድ እንደ ነፋስ ነው
Is féidir liom gloinne a ithe. Ní dhéanann sí dochar ar bith dom.
İstanbul'da ığdır ve şişli; Iİıi
ǅ ǆ ǈ ﬁ ﬂ ﬀ ſ ẞ ß""".split("\n")

MARKS = [
    "😀 😃😄 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇨🇭🇯🇵 ❤️ ☃ 1️⃣",
    "🤖🤖🤖 text🤖text 🤖",
    "e\u0301 é a\u0308\u0304 Å Å K",
    "zero\u200bwidth\u200cjoin\u200der \ufeffbom \u00ad soft \u2028 line \u2029 paragraph \u0085 next",
    "\u202eright to left\u202c",
    "nul\x00 bell\x07 escape\x1b delete\x7f c1\x9f",
    "\ue000\uf8ff private \U0010fffd end",
    "¡¿ « » „ “ ” ‘ ’ … — – ‐ ‑ ― • § ¶ † ‡ © ® ™ ° № € £ ¥ ₹ ₿",
    "∀x∈ℝ: ∃ε>0 ⇒ ∑ᵢ₌₁ⁿ xᵢ² ≤ √2·π ± ∞ ∫₀¹ f(x)dx ≈ 𝔸𝓑𝒞 ½ ¾ ⅓ Ⅷ ² ³ ₁ ①",
    "!!! ??? ... ,,, ;;; ::: --- ___ *** ### $$$ %%% ^^^ &&& ((( ))) [[[ ]]] {{{ }}} <<< >>> ||| \\\\\\ ///",
    "a.b.c a,b a;b a:b a-b a_b a/b a\\b a|b a&b a@b.org #tag $var %20 ~/x `y` ^z",
]

CODE = [
    "def f(x: int) -> int:\n    return x**2 + 1  # comment\n",
    'for i in range(10):\n\tif i % 2 == 0:\n\t\tprint(f"{i:>3d}")\n',
    'fn main() {\n    let v: Vec<u8> = vec![0x1F, 0b1010, 1_000];\n    println!("{:?}", v);\n}\n',
    '#include <stdio.h>\nint main(void){printf("%d\\n", 42);return 0;}\r\n',
    "SELECT a.id, COUNT(*) FROM t AS a WHERE a.x >= 3.14 GROUP BY 1;\n",
    "<div class=\"row\"><a href='https://example.org/?q=1&p=2#top'>link</a></div>",
    "const add = (a, b) => a + b; // 2 + 2 === 4\nexport default add;",
    '{"key": [1, 2.5, -3e-10, null, true], "nested": {"a": ""}}',
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n## Heading\n\n- item\n  - sub\n\n```python\nx = 1\n```\n",
    "\\begin{equation}\n  E = mc^2 \\label{eq:1}\n\\end{equation}",
    "git commit -m 'fix: off-by-one' && git push origin HEAD~2",
    "camelCaseName snake_case_name SCREAMING_CASE kebab-case-name XMLHttpRequest2",
    "if(x){y();}else{z();}",
    "0xDEADBEEF 0o777 1e-8 6.02e23 3.14159f 1'000'000 u8\"é\"",
]

NUMBERS = ["0", "7", "42", "123", "1234", "12345", "1234567890", "3.14159", "-273.15", "1,234,567.89", "1e10", "50%", "$9.99", "2024-02-29"]
NUMBERS += [
    "12:34:56",
    "+41 44 123 45 67",
    "v1.2.3-rc4",
    "x1y2z3",
    "1st 2nd 3rd",
    "¼+½=¾",
    "٠١٢٣٤٥",
    "१२३",
    "１２３",
    "四十二",
    "IV 4",
    "007",
    "1 2 3",
    "1  2",
]
NUMBERS += [f"{a} + {b} = {a + b}" for a, b in ((1, 1), (17, 25), (999, 1), (12345, 67890))]

SPACES = [
    "",
    " ",
    "  ",
    "   ",
    "    ",
    "        ",
    " " * 17,
    "\t",
    "\t\t",
    " \t ",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    "\r",
    "\n \n",
    " \n",
    "\n  x",
    "\x0b\x0c",
]
SPACES += [f"{left}{word}{right}" for word in ("x", "word", "9", "é", "!") for left in (" ", "  ", "\t", "\n") for right in ("", " ", "  ")]
SPACES += [
    "a b",
    "a  b",
    "a   b",
    "a    b",
    "a \n b",
    "a\tb",
    "a\u00a0b",
    "a\u2003b",
    "a\u3000b",
    "trailing   ",
    "   leading",
    "tab\t\tend\t",
]
SPACES += ["x = 1", "x  = 12", "x =   345", "\t1", "\n1", "  1", "   22", "a  1b   2c", "    return 0\n", "1  \n  2"]

SPECIAL = [
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|> c",
    "<|im_start|><|im_start|>  <|im_end|>\n\n<|im_end|>",
    "<|im_start |> <|im_end> <im_end|> <|IM_END|>",
    "<s>x</s> <s> <unk> <pad> <bos>y<eos> <0x0A> <start_of_turn>user\n2<end_of_turn>",
    "[INST] <<SYS>>\nsystem\n<</SYS>>\n\nuser [/INST] <think>\nhm\n</think>",
    "<repo_name>a/b<file_sep>c.py\n<jupyter_code>1",
    "▁ ▁▁ a▁b Ġ ĠĠ aĠb Ċ Â ##ing @@",
]

CHATS = [
    f"<|im_start|>system\nYou are {who}.<|im_end|>\n<|im_start|>user\n{ask}<|im_end|>\n<|im_start|>assistant\n{say}<|im_end|>\n"
    for who, ask, say in (
        ("helpful", "What is 17 + 25?", "42"),
        ("ein Übersetzer", "bonjour  le monde", "Hallo Welt"),
        ("猫", "喵？", "喵 喵 3"),
    )
]

WORDS = [
    f"{word}{end}"
    for word in ("un", "anti", "pre", "token", "ization", "Internationalization", "AAAAAAAAAAAA", "zzzz")
    for end in ("", "s", " 's")
]

TEXTS = list(dict.fromkeys(LANGUAGES + MARKS + CODE + NUMBERS + SPACES + SPECIAL + CHATS + WORDS))
