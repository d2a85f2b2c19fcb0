"""Texts that are hard to clean and to split, and the words of a small vocabulary."""

HARD = [
    "A photo of a DOG.", "caf\u00e9", "cafe\u0301", "l\u2019\u00e9t\u00e9 \u201cquoted\u201d", "Tom &amp; Jerry &#39;s",
    "  two   spaces \t tab\nnew ", "日本語の文字 中国", "ＦＵＬＬ width \ufb01", "\U0001f600 emoji", "naïve Ünïcode Straße ẞ",
    "", " ", "a" * 150, "under_score-dash/slash", "1,234.56€", "\u200bzero\u200dwidth", "mañana ¿qué?",
    "<s> spelled </s>", "Łódź İstanbul", "ا لعربية", "\x00\x07ctrl", "x\u2581y", "I'm don't", "१२३",
    "&lt;b&gt; &eacute;t&eacute; &nbsp;x &#x27;q&#x27; &amp;amp; &copy 2020 &notin; &not; &quot;q&quot; AT&T R&D",
    "ﾊﾝｶｸ ｶﾀｶﾅ\u3000ideographic", "\u01c6 \u0133 \u0149 \ufb06", "\ufeffBOM", "&hellip; &mdash; &#8217; &rsquo;s",
    "a\r\nb\u2028c",
]  # fmt: skip
WORDS = (
    "a the dog cat photo of red ball on table two dogs play été café mañana naïve 日本 語 文字 Straße quick brown fox jumps "
    "over lazy I'm don't it's under_score 1234 5 6 photo, picture. A The DOG"
).split()
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
