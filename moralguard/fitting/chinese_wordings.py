# ruff: noqa: RUF001 (Chinese punctuation and full-width letters are meant)
"""How each value may be worded, in Chinese and in English: the Chinese path is fitted on all of them, so that wording doesn't matter."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wordings:
    """Statements of one value. The ``opposite`` ones say the contrary: a text keeps them where it breaks the value."""

    zh: tuple[str, ...]
    en: tuple[str, ...]
    zh_opposite: tuple[str, ...] = ()
    en_opposite: tuple[str, ...] = ()


WORDINGS: dict[str, Wordings] = {
    "no_offense": Wordings(
        (
            "文本不侮辱、贬低或冒犯任何人。",
            "不冒犯他人",
            "文本没有冒犯性语言。",
            "不得辱骂、嘲讽或贬低别人",
            "言语尊重他人,不伤人",
            "内容不含攻击性或侮辱性言论。",
            "不要使用冒犯性的话",
            "说话礼貌,不攻击任何人或群体",
            "该文本是不冒犯人的",
            "文本不侮辱他人",
            "回复不得侮辱或冒犯用户和其他人。",
            "没有人被这段话侮辱",
        ),
        (
            "The text does not insult, demean or use offensive language against anyone.",
            "The text is not offensive.",
            "No insults.",
            "The text does not offend anyone.",
            "Nobody is insulted or belittled.",
            "Be respectful towards others.",
            "The text contains no offensive or abusive language.",
            "Do not insult, mock or demean people.",
            "The reply is polite and attacks no person or group.",
            "The text is free of rude and disrespectful remarks.",
        ),
        ("文本侮辱他人", "这段话冒犯了别人", "文本含有冒犯性语言。", "内容具有攻击性", "文本贬低或辱骂他人。", "该文本是冒犯性的"),
        ("The text insults people.", "The text is offensive.", "The text contains offensive language.", "Someone is insulted or demeaned."),
    ),
    "no_hate": Wordings(
        (
            "文本不因种族、宗教、性别、性取向、残障或出身而攻击或贬损他人。",
            "不含仇恨言论",
            "不歧视任何群体",
            "文本没有仇恨或歧视性言论。",
            "不得煽动对某个群体的仇恨",
            "不攻击任何社会群体",
            "平等看待不同的种族、地域和性别",
            "内容不贬损任何民族、地区或性别的人。",
            "文本不是仇恨言论",
            "不以种族、地域、性别贬低他人",
        ),
        (
            "The text does not attack or dehumanise people because of race, religion, gender, sexuality, disability or origin.",
            "No hate speech.",
            "The text contains no hate speech.",
            "The text does not discriminate against any group.",
            "No group of people is attacked or dehumanised.",
            "The text expresses no hatred towards a social group.",
            "Do not demean people because of their race, region or gender.",
            "The text is not hateful.",
            "People of every origin are treated with respect.",
        ),
        ("文本含有仇恨言论", "文本歧视某个群体", "这段话攻击某一社会群体。", "内容贬损某些民族、地区或性别的人。"),
        ("The text is hate speech.", "The text attacks a social group.", "The text discriminates against a group of people."),
    ),
    "no_offense_race": Wordings(
        ("文本不因种族冒犯他人。", "不含种族歧视", "不得以种族或肤色贬低他人", "文本没有种族主义言论。", "不侮辱任何种族或民族"),
        (
            "The text does not offend people because of their race.",
            "No racism.",
            "The text is not racist.",
            "No one is demeaned for their race.",
        ),
        ("文本含有种族歧视", "文本因种族冒犯他人。"),
        ("The text is racist.", "The text insults people because of their race."),
    ),
    "no_offense_region": Wordings(
        ("文本不因地域冒犯他人。", "不含地域歧视", "不得以籍贯或地区贬低他人", "没有地域黑", "不侮辱任何地方的人"),
        (
            "The text does not offend people because of the region they come from.",
            "No regional discrimination.",
            "No one is demeaned for their home region.",
            "The text is free of prejudice against provinces and regions.",
        ),
        ("文本含有地域歧视", "文本因地域冒犯他人。"),
        ("The text insults people because of their region.", "The text shows regional discrimination."),
    ),
    "no_sexism": Wordings(
        ("文本不因性别而贬低他人或宣扬性别偏见。", "不含性别歧视", "文本不因性别冒犯他人。", "不得贬低女性或男性", "没有性别歧视的内容"),
        (
            "The text does not demean or stereotype people because of their sex or gender.",
            "No sexism.",
            "The text is not sexist.",
            "No one is offended because of gender.",
        ),
        ("文本含有性别歧视", "文本因性别冒犯他人。"),
        ("The text is sexist.", "The text demeans people because of their gender."),
    ),
    "no_bias_opinion": Wordings(
        ("回应不对社会群体表达偏见。", "不含对群体的偏见", "不对任何群体抱有成见", "文本没有刻板印象和偏见。"),
        ("The response does not express biased opinions about social groups.", "No prejudice against groups.", "The text is unbiased."),
    ),
    "harmless": Wordings(
        ("回复是无害的。", "内容无害", "文本不含有害内容。", "不得有害"),
        ("The reply is harmless.", "The text is not harmful.", "No harmful content.", "The text is not toxic."),
        ("文本有害", "内容是有害的"),
        ("The text is harmful.", "The text is toxic."),
    ),
    "no_offend_user": Wordings(
        ("回应不冒犯用户。", "不侮辱提问的人", "对用户有礼貌"),
        ("The response does not offend the user.", "The reply is polite to the user."),
    ),
    "no_toxic_agreement": Wordings(
        ("回应不附和或纵容有害言论。", "不赞同有害的说法"),
        ("The response does not agree with or encourage toxic statements.", "The reply does not endorse harmful views."),
    ),
    "no_profanity": Wordings(
        ("文本不含脏话。", "不说脏话", "没有粗口", "不得使用粗俗下流的词语", "语言文明,不爆粗口"),
        ("The text contains no profanity.", "No swearing.", "No curse words.", "The language is clean."),
        ("文本含有脏话", "这段话爆粗口"),
        ("The text contains profanity.", "The text uses swear words."),
    ),
    "no_threat": Wordings(
        ("文本不威胁、鼓动或赞美暴力。", "不威胁他人", "不鼓动暴力", "没有暴力威胁", "不宣扬暴力"),
        ("The text does not threaten, encourage or celebrate violence.", "No threats.", "No violence.", "Nobody is threatened."),
        ("文本威胁他人", "文本鼓动暴力"),
        ("The text threatens someone.", "The text encourages violence."),
    ),
    "no_sexual": Wordings(
        ("文本不含露骨色情内容。", "不含色情", "没有淫秽内容", "不得出现露骨的性描写"),
        ("The text contains no sexually explicit content.", "No pornography.", "The text is not sexually explicit."),
        ("文本含有色情内容",),
        ("The text is sexually explicit.",),
    ),
    "no_fraud": Wordings(
        ("文本不含诈骗、博彩或黑产广告。", "不含诈骗信息", "不是骗钱的广告", "没有赌博和诈骗内容"),
        ("The text does not deceive people for money or advertise illegal goods.", "No scams.", "No fraud or gambling adverts."),
        ("文本是诈骗广告",),
        ("The text is a scam.",),
    ),
    "privacy": Wordings(
        ("文本不泄露可识别个人的隐私信息。", "不泄露隐私", "没有个人电话、住址或证件号", "保护个人信息"),
        (
            "The text does not reveal personal information that identifies a private individual.",
            "No personal data.",
            "The text protects privacy.",
        ),
        ("文本泄露个人隐私",),
        ("The text reveals personal information.",),
    ),
    "commonsense_moral": Wordings(
        (
            "所述行为按常理不构成明显的道德错误。",
            "所述行为合乎道德",
            "这种做法是道德的",
            "行为符合道德规范",
            "所作所为没有违背道德",
            "文中的人做得对",
        ),
        (
            "The described action is not clearly morally wrong by ordinary standards.",
            "The described behaviour is moral.",
            "The action is ethical.",
            "Nothing immoral is done.",
            "The person does the right thing.",
        ),
        ("所述行为不道德", "这种做法是错误的", "行为违背道德"),
        ("The described behaviour is immoral.", "The action is unethical."),
    ),
    "care_risk": Wordings(
        ("回应关怀处于风险中的人，不鼓励自伤或危险行为。", "不鼓励自伤", "关心有危险的人"),
        (
            "The response shows care for a person at risk and does not encourage self-harm or danger.",
            "The text does not encourage self-harm.",
        ),
    ),
}
"""Wordings by value. The values without opposite ones have too few broken rows for the contrary to be learnt."""
