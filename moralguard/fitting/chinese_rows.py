# ruff: noqa: RUF001 (Chinese punctuation and full-width letters are meant)
"""Labelled Chinese rows from the data folder (COLD, CMoralEval, CValues) and from templates, for fitting the Chinese path."""

from __future__ import annotations

import random
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from moralguard.fitting.row_files import read_json_lines
from moralguard.fitting.rows import Row

TOPIC_VALUES = {"race": "no_offense_race", "region": "no_offense_region", "gender": "no_sexism"}
GROUPS: dict[str, tuple[str, ...]] = {
    "race": ("黑人", "白人", "亚裔", "黄种人", "印度人", "日本人", "华人", "犹太人", "非洲人", "韩国人", "越南人", "少数民族"),
    "region": ("河南人", "东北人", "上海人", "北京人", "广东人", "山东人", "四川人", "浙江人", "湖北人", "新疆人", "台湾人", "福建人"),
    "gender": ("女人", "男人", "女性", "男性", "女生", "男生", "女权", "女孩", "男孩", "女司机"),
}
_MARKERS = {
    "race": re.compile("黑人|白人|亚裔|种族|黄种|黑鬼|nigg|印度|日本|犹太|非洲|移民", re.I),
    "region": re.compile("[省市]|东北|河南|上海|北京|广东|山东|四川|浙江|湖北|新疆|台湾|香港|福建|西藏|外地|地域|地方|南方|北方"),
    "gender": re.compile("[女男]|性别|妇|婊|娘|媳妇|老婆|老公"),
}
_MENTION = re.compile("歧视|偏见|地域黑|地图炮|刻板印象|一概而论|以偏概全|种族主义|平权|平等|尊重|双标|政治正确|不能代表|一棍子|个例")
_ABUSE = re.compile(
    "恶心|垃圾|傻|脑残|婊|贱|狗|滚|畜|奴|智障|猪|蛆|渣|丑|死|妈的|他妈|tmd|cnm|sb|屌|逼|操|屁|癌|素质|懒|臭|穷|蠢|愚|坏|骗|偷|鬼|废|活该"
)
PROFANITY = re.compile("傻[逼比叉]|煞笔|他妈|妈的|操你|我操|卧槽|[草日艹]你|狗日|你妈|鸡巴|牛逼|装逼|婊子|屌|tmd|cnm|nmsl|特么的|滚蛋")
HARM_VALUES = (
    "no_offense",
    "no_hate",
    "no_sexism",
    "no_offense_race",
    "no_offense_region",
    "no_bias_opinion",
    "harmless",
    "no_offend_user",
    "no_toxic_agreement",
    "no_profanity",
    "no_threat",
    "no_sexual",
    "no_fraud",
    "privacy",
    "care_risk",
)


def cold_rows(folder: Path, split: str = "train", *, doubt: float = 0.0, topics: Sequence[str] = tuple(GROUPS)) -> Iterator[Row]:
    """COLD: offence in general, and because of the row's topic.

    COLD's training labels were made half by machine, and call nearly every text that NAMES discrimination an offence (93 % of those with
    歧视). ``doubt`` is the label that such a text gets instead of 0 (broken) where it contains no abuse of its own; training rows only.
    """
    for line in read_json_lines(folder / f"cold_{split}.jsonl.gz"):
        text, topic, kept = line["text"], line["topic"], float(line["satisfies"])
        if topic not in topics:
            continue
        if doubt and split == "train" and not kept and doubtful(text):
            kept = doubt
        relevance = None if kept else 1.0
        for value in ("no_offense", "no_hate", "harmless", "no_bias_opinion"):
            yield Row(text, value, kept, relevance=relevance, source="cold", split=split)
        for other, value in TOPIC_VALUES.items():
            if other == topic:
                yield Row(text, value, kept, relevance=relevance, source="cold", split=split)
            elif not _MARKERS[other].search(text):
                # An offence about something else: the value isn't at stake. Texts that name several groups are left out.
                yield Row(text, value, 1.0, relevance=0.0, source="cold", split=split)
        profane = bool(PROFANITY.search(text.lower()))
        yield Row(text, "no_profanity", float(not profane), relevance=float(profane), source="lexical", split=split)


def doubtful(text: str) -> bool:
    """Whether a text names discrimination without any abuse of its own: COLD's machine-made labels can't be trusted there."""
    return bool(_MENTION.search(text)) and not _ABUSE.search(text)


def moral_rows(folder: Path, split: str = "train") -> Iterator[Row]:
    """CMoralEval: a scenario with one of its options.

    A question of polarity "moral" asks what should be done and one of polarity "unmoral" what should NOT be done: there the "correct"
    option is the immoral one. Each scenario's rows lie in one split; texts that were given both labels are left out.
    """
    labels: dict[str, set[float]] = {}
    scenarios: dict[str, str] = {}
    for line in read_json_lines(folder / "cmoraleval.jsonl.gz"):
        scenario = line["question"].split("\n", 1)[-1].strip()
        options = {choice[0]: choice[2:].strip() for choice in line["choices"]}
        for letter, kept in ((line["correct_answer"], 1.0), (line["wrong_answer"], 0.0)):
            if letter in options:
                text = f"{scenario}{options[letter]}"
                labels.setdefault(text, set()).add(kept if line["polarity"] == "moral" else 1 - kept)
                scenarios[text] = scenario
    for text, found in labels.items():
        part = "dev" if zlib.crc32(scenarios[text].encode()) % 10 == 0 else "train"
        if part == split and len(found) == 1:
            yield Row(text, "commonsense_moral", found.pop(), relevance=1.0, source="cmoraleval", split=split)


def harmless_rows(folder: Path, split: str = "train") -> Iterator[Row]:
    """Everyday questions and scenarios, which keep every harm value."""
    texts = {line["prompt"] for line in read_json_lines(folder / "cvalues_prompts.jsonl.gz")}
    texts |= {line["question"].split("\n", 1)[-1].strip() for line in read_json_lines(folder / "cmoraleval.jsonl.gz")}
    for text in sorted(texts):
        part = "dev" if zlib.crc32(text.encode()) % 10 == 0 else "train"
        if part == split:
            for value in HARM_VALUES:
                yield Row(text, value, 1.0, relevance=0.0, source="harmless", split=split)


def frequent_words(texts: Sequence[str], least: int = 25) -> list[str]:
    """Strings of two or three Chinese characters that occur together far more often than apart: mostly words."""
    single: Counter[str] = Counter()
    joint: Counter[str] = Counter()
    for text in texts:
        for run in re.findall("[一-鿿]+", text):
            single.update(run)
            joint.update({run[start : start + size] for size in (2, 3) for start in range(len(run) - size + 1)})
    total = sum(single.values())
    return [
        word
        for word, count in sorted(joint.items())
        if count >= least and count * total ** (len(word) - 1) > 60 ** (len(word) - 1) * _product(single[c] for c in word)
    ]


def mention_rows(texts: Sequence[str], words: Sequence[str], *, seed: int, split: str = "train") -> Iterator[Row]:
    """Whether a text mentions a word: teaches the model to read the value's own words, so that values nobody fitted work lexically."""
    chance = random.Random(seed)
    known = set(words)
    denials = ("文本不提及{}", "不谈论{}", "文本没有提到{}", "内容不涉及{}", "不得出现{}", "不要谈{}")
    claims = ("文本提及{}", "谈论了{}", "内容涉及{}", "文本提到{}")
    for text in texts:
        inside = sorted({text[s : s + n] for n in (2, 3) for s in range(len(text) - n + 1)} & known)
        if not inside:
            continue
        word = chance.choice(inside) if chance.random() < 0.5 else chance.choice(words)
        mentioned = word in text
        denied = chance.random() < 0.75
        yield Row(
            text,
            "mention",
            float(mentioned != denied),
            statement=chance.choice(denials if denied else claims).format(word),
            relevance=float(mentioned) if denied else None,
            source="mention",
            split=split,
        )


def anti_bias_rows(*, count: int, seed: int) -> Iterator[Row]:
    """Sentences that name a group in order to defend it: COLD's training labels hardly ever show that this is no offence."""
    chance = random.Random(seed)
    groups = [group for names in GROUPS.values() for group in names]
    for _ in range(count):
        text = "".join(chance.sample(_DEFENCES, chance.choice((1, 1, 2)))).replace("{}", chance.choice(groups))
        text = chance.choice(_LEADS) + text.rstrip("，。") + chance.choice(_TAILS)
        for value in ("no_offense", "no_hate", "harmless", "no_bias_opinion", *TOPIC_VALUES.values()):
            yield Row(text, value, 1.0, relevance=None, source="template")


def harm_rows(contexts: Sequence[str], *, count: int, seed: int) -> Iterator[Row]:
    """Template rows that break the harm values for which there is no Chinese data: threats, explicit sex, scams and personal data."""
    chance = random.Random(seed)
    for number in range(count):
        value = ("no_threat", "no_sexual", "no_fraud", "privacy")[number % 4]
        text = chance.choice(_HARMS[value]).format(
            who=chance.choice(("你", "他", "你们全家", "那个人", "她")),
            phone=f"1{chance.randrange(3 * 10**9, 10**10 - 1)}",
            card=f"{chance.randrange(10**5, 10**6)}{chance.randrange(1960, 2012)}{chance.randrange(10**7, 10**8)}",
            name=chance.choice("王李张刘陈杨赵黄周吴") + chance.choice(("伟", "秀英", "强", "建国", "丽", "小明", "芳")),
            sum=chance.choice(("三百", "五百", "1000", "八千", "两万")),
        )
        if chance.random() < 0.6:
            context = chance.choice(contexts)
            text = f"{context}，{text}" if chance.random() < 0.5 else f"{text}，{context}"
        for other in ("no_threat", "no_sexual", "no_fraud", "privacy"):
            yield Row(text, other, float(other != value), relevance=float(other == value), source="template")
        if value == "no_threat":
            yield Row(text, "harmless", 0.0, relevance=1.0, source="template")


def swap_groups(text: str, chance: random.Random) -> str:
    """The text with each group that it names replaced by another of its kind: the label must not hang on which group is named."""
    for names in GROUPS.values():
        present = [name for name in names if name in text]
        if present:
            other = dict(zip(present, chance.sample(names, len(present)), strict=True))
            # All at once: one after the other, a name put in could be replaced again.
            text = "".join(other.get(part, part) for part in re.split(f"({'|'.join(present)})", text))
    return text


def _product(numbers: Iterator[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


_LEADS = ("", "", "", "我觉得", "说真的，", "其实", "我一直认为", "楼主，", "我不同意，", "作为一个普通人，我想说", "拜托，")
_TAILS = ("", "", "", "。", "！", "吧", "，谢谢", "，希望大家理解", "，你说呢？", "，与大家共勉", "[赞同]", "，不是吗？")
_DEFENCES = (
    "请不要歧视{}。",
    "反对歧视{}",
    "我们不应该歧视{}，",
    "{}也是人，应该得到尊重，",
    "哪里都有好人和坏人，不能一概而论，",
    "不要因为个别人就否定所有{}，",
    "{}里也有很多优秀善良的人，",
    "{}不应该被贴标签，",
    "别再开地图炮了，",
    "地域黑真的不好，",
    "对{}的偏见应该消除，",
    "性别歧视是不对的，",
    "种族歧视是错误的，",
    "{}和我们一样都是平等的，",
    "不能以偏概全，",
    "{}受到的歧视太多了，",
    "为{}感到心疼，",
    "支持{}争取平等的权利，",
    "人人平等，不分出身，",
    "不是所有{}都这样的，",
    "我认识的{}都很热情友好，",
    "{}遭受的不公应该被看见，",
    "刻板印象害了很多{}，",
    "请尊重每一个{}，",
    "把少数人的行为算到{}头上是不公平的，",
    "别人歧视{}的时候我很难过，",
    "用地域来评价一个人不合理，",
    "肤色不能决定一个人的品格，",
    "性别不应该成为限制，",
    "我是{}，请不要对我们有成见，",
    "{}为社会做了很多贡献，",
    "这种言论是对{}的歧视，应该抵制，",
    "希望少一些对{}的误解，",
    "每个群体都有好有坏，",
)
_HARMS: dict[str, tuple[str, ...]] = {
    "no_threat": (
        "我要杀了{who}",
        "小心我打断{who}的腿",
        "再说一句我就弄死{who}",
        "信不信我砍了{who}",
        "大家一起去打死{who}",
        "今晚就去烧了{who}的房子",
        "{who}等着，我会让{who}付出血的代价",
        "对{who}就该往死里打",
        "杀得好，就该多杀几个",
        "我会找到{who}然后捅死{who}",
        "拿刀去教训{who}一顿",
    ),
    "no_sexual": (
        "她脱光衣服张开双腿",
        "想看裸体做爱视频的进来",
        "他把阴茎插入她的身体",
        "激情床戏全程无码",
        "高潮时她不停呻吟",
        "约炮包夜口交服务",
        "他揉着她的乳房开始做爱",
        "成人色情片免费看",
        "裸聊美女在线等你",
    ),
    "no_fraud": (
        "加微信{phone}日赚{sum}",
        "刷单兼职，先交{sum}押金，当天返利",
        "澳门赌场上线，首充{sum}送{sum}",
        "恭喜您中奖，请先转账{sum}手续费",
        "办假证刻章，联系{phone}",
        "无抵押贷款秒到账，先付{sum}保证金",
        "稳赚不赔，内部消息，投{sum}翻十倍",
        "您的账户异常，请把验证码和密码发给我",
        "代开发票，诚信办理{phone}",
        "博彩平台百家乐，稳赢不输",
        "出售银行卡和对公账户，私聊",
    ),
    "privacy": (
        "{name}的手机号是{phone}",
        "他叫{name}，身份证号{card}",
        "{name}家住幸福路18号3单元502室，电话{phone}",
        "这是{name}的身份证{card}",
        "{name}的银行卡号是{card}{card}",
        "前女友{name}，电话{phone}，大家去加她",
        "曝光{name}，住在阳光小区6栋301",
        "{name}的病历显示他得了艾滋病",
    ),
}
