"""What the demo corpus asks and says: the relations between the tables' columns, and small talk.

In a phrasing ``{s}`` is the subject (法国), ``{a}`` the answer (巴黎), ``{v}`` the verb where a
relation has one (发明). Every question stands beside the complete answer that fits it; the curt
answer is ``{a}`` alone.
"""

from dataclasses import dataclass

import facts


@dataclass(frozen=True)
class Fact:
    """One subject of a relation with its answer; ``accept`` also holds other right answers."""

    subject: str
    accept: tuple[str, ...]
    verb: str = ""

    @property
    def answer(self) -> str:
        return self.accept[0]


@dataclass(frozen=True)
class Relation:
    """One thing one can ask about a kind of subject."""

    name: str
    kind: str  # relations of one kind share their subjects: 它 can then move from one to the other
    facts: tuple[Fact, ...]
    questions: tuple[tuple[str, str], ...]  # (question, complete answer)
    statements: tuple[str, ...]  # for pretraining
    it: tuple[tuple[str, str], ...] = ()  # questions that name the subject by a pronoun
    next: tuple[str, ...] = (
        "那{s}呢？",
        "{s}呢？",
        "换成{s}呢？",
    )  # asks the same of another subject
    exam: str = ""  # subject of C-Eval under which the exam asks it
    language: str = "zh"
    stop: str = "。"

    def fill(self, text: str, fact: Fact) -> str:
        """Return ``text`` about ``fact``."""
        return text.format(s=fact.subject, a=fact.answer, v=fact.verb)


def column(table: dict[str, tuple], index: int) -> tuple[Fact, ...]:
    """Return the facts of one column of a table, without the gaps."""
    return tuple(
        Fact(subject, tuple(row[index].split("|"))) for subject, row in table.items() if row[index]
    )


def pairs(table: dict[str, str]) -> tuple[Fact, ...]:
    """Return the facts of a table with a single column."""
    return tuple(Fact(subject, tuple(answer.split("|"))) for subject, answer in table.items())


ENGLISH_NEXT = ("What about {s}?", "And {s}?", "How about {s}?")

RELATIONS = (
    Relation(
        name="capital",
        kind="country",
        facts=column(facts.COUNTRIES, 0),
        exam="middle_school_geography",
        questions=(
            ("{s}的首都是哪里？", "{s}的首都是{a}。"),
            ("{s}的首都在哪里？", "{s}的首都在{a}。"),
            ("{s}的首都叫什么名字？", "{s}的首都叫{a}。"),
            ("请问{s}的首都是哪座城市？", "{s}的首都是{a}。"),
            ("你知道{s}的首都吗？", "知道，{s}的首都是{a}。"),
            ("哪座城市是{s}的首都？", "{s}的首都是{a}。"),
            ("告诉我{s}的首都。", "{s}的首都是{a}。"),
            ("{s}首都是什么城市？", "{s}首都是{a}。"),
        ),
        it=(("它的首都是哪里？", "{s}的首都是{a}。"), ("这个国家的首都呢？", "{s}的首都是{a}。")),
        statements=(
            "{s}的首都是{a}。",
            "{a}是{s}的首都。",
            "{s}首都{a}，是这个国家的政治中心。",
            "如果去{s}的首都，要去的城市就是{a}。",
        ),
    ),
    Relation(
        name="continent",
        kind="country",
        facts=column(facts.COUNTRIES, 1),
        exam="middle_school_geography",
        questions=(
            ("{s}在哪个洲？", "{s}在{a}。"),
            ("{s}位于哪个大洲？", "{s}位于{a}。"),
            ("{s}是哪个洲的国家？", "{s}是{a}的国家。"),
            ("请问{s}属于哪个洲？", "{s}属于{a}。"),
            ("你知道{s}在哪个大洲吗？", "知道，{s}在{a}。"),
            ("{s}属于世界上的哪个大洲？", "{s}属于{a}。"),
            ("告诉我{s}在哪个洲。", "{s}在{a}。"),
        ),
        it=(("它在哪个洲？", "{s}在{a}。"), ("这个国家在哪个大洲？", "{s}在{a}。")),
        statements=("{s}位于{a}。", "{s}是{a}的一个国家。", "在{a}的国家里，有一个是{s}。"),
    ),
    Relation(
        name="currency",
        kind="country",
        facts=column(facts.COUNTRIES, 2),
        exam="civil_servant",
        questions=(
            ("{s}的货币是什么？", "{s}的货币是{a}。"),
            ("{s}使用什么货币？", "{s}使用{a}。"),
            ("{s}用什么钱？", "{s}用的是{a}。"),
            ("请问{s}的货币叫什么？", "{s}的货币叫{a}。"),
            ("你知道{s}的货币吗？", "知道，{s}的货币是{a}。"),
            ("在{s}买东西要用什么货币？", "在{s}买东西要用{a}。"),
            ("告诉我{s}的货币。", "{s}的货币是{a}。"),
        ),
        it=(("它的货币是什么？", "{s}的货币是{a}。"), ("这个国家用什么货币？", "{s}用的是{a}。")),
        statements=("{s}的货币是{a}。", "{s}使用的货币是{a}。", "在{s}，人们买东西用{a}。"),
    ),
    Relation(
        name="province_capital",
        kind="province",
        facts=column(facts.PROVINCES, 0),
        exam="middle_school_geography",
        questions=(
            ("{s}的省会或首府是哪里？", "{s}的省会或首府是{a}。"),
            ("{s}的行政中心是哪座城市？", "{s}的行政中心是{a}。"),
            ("{s}的省会或首府叫什么？", "{s}的省会或首府叫{a}。"),
            ("请问{s}的行政中心在哪里？", "{s}的行政中心在{a}。"),
            ("哪座城市是{s}的行政中心？", "{s}的行政中心是{a}。"),
            ("你知道{s}的省会或首府吗？", "知道，{s}的省会或首府是{a}。"),
            ("告诉我{s}的行政中心。", "{s}的行政中心是{a}。"),
        ),
        it=(
            ("它的行政中心是哪里？", "{s}的行政中心是{a}。"),
            ("它的省会或首府呢？", "{s}的省会或首府是{a}。"),
        ),
        statements=("{s}的行政中心是{a}。", "{a}是{s}的省会或首府。", "{s}的省会或首府设在{a}。"),
    ),
    Relation(
        name="province_short_name",
        kind="province",
        facts=column(facts.PROVINCES, 1),
        exam="middle_school_geography",
        questions=(
            ("{s}的简称是什么？", "{s}的简称是{a}。"),
            ("{s}简称什么？", "{s}简称{a}。"),
            ("请问{s}的简称是哪个字？", "{s}的简称是{a}。"),
            ("{s}可以简称为什么？", "{s}可以简称为{a}。"),
            ("你知道{s}的简称吗？", "知道，{s}的简称是{a}。"),
            ("告诉我{s}的简称。", "{s}的简称是{a}。"),
            ("车牌和地图上，{s}的简称怎么写？", "{s}的简称写作{a}。"),
        ),
        it=(("它的简称是什么？", "{s}的简称是{a}。"), ("它简称什么？", "{s}简称{a}。")),
        statements=("{s}简称{a}。", "{s}的简称是{a}。", "地图上常把{s}简写成{a}。"),
    ),
    Relation(
        name="element_symbol",
        kind="element",
        facts=column(facts.ELEMENTS, 0),
        exam="middle_school_chemistry",
        questions=(
            ("{s}的元素符号是什么？", "{s}的元素符号是{a}。"),
            ("{s}元素用什么符号表示？", "{s}元素用{a}表示。"),
            ("{s}的化学符号是什么？", "{s}的化学符号是{a}。"),
            ("请问{s}的元素符号怎么写？", "{s}的元素符号写作{a}。"),
            ("你知道{s}的元素符号吗？", "知道，{s}的元素符号是{a}。"),
            ("元素周期表里{s}的符号是什么？", "{s}的符号是{a}。"),
            ("告诉我{s}的元素符号。", "{s}的元素符号是{a}。"),
        ),
        it=(
            ("它的元素符号是什么？", "{s}的元素符号是{a}。"),
            ("它用什么符号表示？", "{s}用{a}表示。"),
        ),
        statements=("{s}的元素符号是{a}。", "{a}是{s}的元素符号。", "在化学里，{s}写作{a}。"),
    ),
    Relation(
        name="atomic_number",
        kind="element",
        facts=column(facts.ELEMENTS, 1),
        exam="middle_school_chemistry",
        questions=(
            ("{s}的原子序数是多少？", "{s}的原子序数是{a}。"),
            ("{s}是第几号元素？", "{s}是{a}号元素。"),
            ("{s}在元素周期表中排第几？", "{s}在元素周期表中排第{a}。"),
            ("请问{s}的原子序数是几？", "{s}的原子序数是{a}。"),
            ("你知道{s}的原子序数吗？", "知道，{s}的原子序数是{a}。"),
            ("{s}原子里有几个质子？", "{s}原子里有{a}个质子。"),
            ("告诉我{s}的原子序数。", "{s}的原子序数是{a}。"),
        ),
        it=(
            ("它的原子序数是多少？", "{s}的原子序数是{a}。"),
            ("它是第几号元素？", "{s}是{a}号元素。"),
        ),
        statements=("{s}的原子序数是{a}。", "{s}是{a}号元素。", "{s}的原子核里有{a}个质子。"),
    ),
    Relation(
        name="founder",
        kind="dynasty",
        facts=column(facts.DYNASTIES, 0),
        exam="middle_school_history",
        questions=(
            ("{s}是谁建立的？", "{s}是{a}建立的。"),
            ("谁建立了{s}？", "{s}是{a}建立的。"),
            ("{s}的建立者是谁？", "{s}的建立者是{a}。"),
            ("{s}的开国君主是谁？", "{s}的开国君主是{a}。"),
            ("请问{s}由谁建立？", "{s}由{a}建立。"),
            ("你知道{s}的建立者吗？", "知道，{s}的建立者是{a}。"),
            ("告诉我{s}的开国君主。", "{s}的开国君主是{a}。"),
        ),
        it=(("它是谁建立的？", "{s}是{a}建立的。"), ("它的建立者是谁？", "{s}的建立者是{a}。")),
        statements=("{s}是{a}建立的。", "{a}建立了{s}。", "{s}的开国君主是{a}。"),
    ),
    Relation(
        name="dynasty_capital",
        kind="dynasty",
        facts=column(facts.DYNASTIES, 1),
        exam="middle_school_history",
        questions=(
            ("{s}的都城在哪里？", "{s}的都城在{a}。"),
            ("{s}定都哪里？", "{s}定都{a}。"),
            ("{s}的都城是哪里？", "{s}的都城是{a}。"),
            ("请问{s}把都城设在哪里？", "{s}把都城设在{a}。"),
            ("你知道{s}的都城吗？", "知道，{s}的都城是{a}。"),
            ("{s}的都城叫什么？", "{s}的都城叫{a}。"),
            ("告诉我{s}的都城。", "{s}的都城是{a}。"),
        ),
        it=(("它的都城在哪里？", "{s}的都城在{a}。"), ("它定都哪里？", "{s}定都{a}。")),
        statements=("{s}的都城是{a}。", "{s}定都{a}。", "{s}的君主住在都城{a}。"),
    ),
    Relation(
        name="author",
        kind="work",
        facts=pairs({f"《{work}》": author for work, author in facts.AUTHORS.items()}),
        exam="chinese_language_and_literature",
        questions=(
            ("{s}的作者是谁？", "{s}的作者是{a}。"),
            ("{s}是谁写的？", "{s}是{a}写的。"),
            ("谁写了{s}？", "{s}是{a}写的。"),
            ("请问{s}是谁的作品？", "{s}是{a}的作品。"),
            ("你知道{s}的作者吗？", "知道，{s}的作者是{a}。"),
            ("{s}出自谁的笔下？", "{s}出自{a}笔下。"),
            ("告诉我{s}的作者。", "{s}的作者是{a}。"),
        ),
        statements=("{s}的作者是{a}。", "{a}写了{s}。", "{s}是{a}的作品。"),
    ),
    Relation(
        name="achievement",
        kind="achievement",
        facts=tuple(
            Fact(thing, tuple(person.split("|")), verb)
            for thing, (verb, person) in facts.ACHIEVEMENTS.items()
        ),
        exam="civil_servant",
        questions=(
            ("{s}是谁{v}的？", "{s}是{a}{v}的。"),
            ("谁{v}了{s}？", "{s}是{a}{v}的。"),
            ("请问{v}{s}的人是谁？", "{v}{s}的人是{a}。"),
            ("{s}由谁{v}？", "{s}由{a}{v}。"),
            ("你知道是谁{v}了{s}吗？", "知道，{s}是{a}{v}的。"),
            ("是哪位人物{v}了{s}？", "{s}是{a}{v}的。"),
            ("告诉我{s}是谁{v}的。", "{s}是{a}{v}的。"),
        ),
        next=("那{s}呢？", "{s}呢？", "{s}又是谁{v}的？"),
        statements=("{s}是{a}{v}的。", "{a}{v}了{s}。", "{v}{s}的人是{a}。"),
    ),
    Relation(
        name="idiom",
        kind="idiom",
        facts=pairs(facts.IDIOMS),
        exam="chinese_language_and_literature",
        questions=(
            ("成语{s}说的是谁？", "成语{s}说的是{a}。"),
            ("{s}讲的是谁的故事？", "{s}讲的是{a}的故事。"),
            ("{s}的主人公是谁？", "{s}的主人公是{a}。"),
            ("请问成语{s}和谁有关？", "成语{s}和{a}有关。"),
            ("你知道{s}说的是谁吗？", "知道，{s}说的是{a}。"),
            ("{s}这个典故的主角是谁？", "{s}这个典故的主角是{a}。"),
            ("告诉我{s}的主人公。", "{s}的主人公是{a}。"),
        ),
        statements=("{s}说的是{a}的故事。", "成语{s}的主人公是{a}。", "{a}的故事留下了成语{s}。"),
    ),
    Relation(
        name="opposite",
        kind="word",
        facts=pairs(facts.OPPOSITES),
        exam="chinese_language_and_literature",
        questions=(
            ("{s}的反义词是什么？", "{s}的反义词是{a}。"),
            ("和{s}意思相反的词是什么？", "和{s}意思相反的词是{a}。"),
            ("{s}的对立面是什么？", "{s}的对立面是{a}。"),
            ("请说出{s}的反义词。", "{s}的反义词是{a}。"),
            ("你知道{s}的反义词吗？", "知道，{s}的反义词是{a}。"),
            ("请问与{s}相反的词是哪个？", "与{s}相反的词是{a}。"),
            ("给{s}找一个反义词。", "{s}的反义词是{a}。"),
        ),
        statements=("{s}的反义词是{a}。", "{s}和{a}意思相反。", "{s}与{a}是一对反义词。"),
    ),
    Relation(
        name="mountain",
        kind="mountain",
        facts=pairs(facts.MOUNTAINS),
        exam="middle_school_geography",
        questions=(
            ("{s}在哪个省？", "{s}在{a}。"),
            ("{s}位于哪个省？", "{s}位于{a}。"),
            ("想爬{s}应该去哪个省？", "想爬{s}应该去{a}。"),
            ("请问{s}坐落在哪个省？", "{s}坐落在{a}。"),
            ("你知道{s}在哪个省吗？", "知道，{s}在{a}。"),
            ("{s}是哪个省的名山？", "{s}是{a}的名山。"),
            ("告诉我{s}在哪个省。", "{s}在{a}。"),
        ),
        statements=("{s}位于{a}。", "{a}有一座名山叫{s}。", "想爬{s}，要到{a}去。"),
    ),
    Relation(
        name="river",
        kind="river",
        facts=pairs(facts.RIVERS),
        exam="middle_school_geography",
        questions=(
            ("{s}在哪个洲？", "{s}在{a}。"),
            ("{s}流经哪个大洲？", "{s}流经{a}。"),
            ("{s}是哪个洲的河流？", "{s}是{a}的河流。"),
            ("请问{s}位于哪个大洲？", "{s}位于{a}。"),
            ("你知道{s}在哪个大洲吗？", "知道，{s}在{a}。"),
            ("想看{s}要去哪个大洲？", "想看{s}要去{a}。"),
            ("告诉我{s}在哪个洲。", "{s}在{a}。"),
        ),
        statements=("{s}是{a}的河流。", "{s}流经{a}。", "{a}有一条大河叫{s}。"),
    ),
    Relation(
        name="sight",
        kind="sight",
        facts=pairs(facts.SIGHTS),
        exam="civil_servant",
        questions=(
            ("{s}在哪座城市？", "{s}在{a}。"),
            ("{s}位于哪座城市？", "{s}位于{a}。"),
            ("想看{s}要去哪座城市？", "想看{s}要去{a}。"),
            ("请问{s}在什么地方？", "{s}在{a}。"),
            ("你知道{s}在哪座城市吗？", "知道，{s}在{a}。"),
            ("{s}是哪座城市的名胜？", "{s}是{a}的名胜。"),
            ("告诉我{s}在哪座城市。", "{s}在{a}。"),
        ),
        statements=("{s}在{a}。", "{a}有著名的{s}。", "{s}是{a}的名胜。"),
    ),
    Relation(
        name="festival",
        kind="festival",
        facts=pairs(facts.FESTIVALS),
        exam="civil_servant",
        questions=(
            ("{s}是哪一天？", "{s}是{a}。"),
            ("{s}在什么时候？", "{s}在{a}。"),
            ("每年的{s}是几月几日？", "每年的{s}是{a}。"),
            ("请问{s}是什么日子？", "{s}是{a}。"),
            ("你知道{s}是哪一天吗？", "知道，{s}是{a}。"),
            ("人们在哪一天过{s}？", "人们在{a}过{s}。"),
            ("告诉我{s}的日期。", "{s}的日期是{a}。"),
        ),
        statements=("{s}是{a}。", "每年{a}是{s}。", "人们在{a}过{s}。"),
    ),
    Relation(
        name="season",
        kind="solar_term",
        facts=pairs(facts.SOLAR_TERMS),
        exam="middle_school_geography",
        questions=(
            ("节气{s}在哪个季节？", "{s}在{a}。"),
            ("{s}是哪个季节的节气？", "{s}是{a}的节气。"),
            ("二十四节气里，{s}属于哪个季节？", "{s}属于{a}。"),
            ("请问{s}这个节气在什么季节？", "{s}在{a}。"),
            ("你知道节气{s}在哪个季节吗？", "知道，{s}在{a}。"),
            ("到了{s}是什么季节？", "到了{s}是{a}。"),
            ("告诉我节气{s}属于哪个季节。", "{s}属于{a}。"),
        ),
        statements=("{s}是{a}的节气。", "二十四节气里的{s}在{a}。", "{a}有一个节气叫{s}。"),
    ),
    Relation(
        name="planet",
        kind="planet",
        facts=pairs(facts.PLANETS),
        exam="middle_school_geography",
        questions=(
            ("{s}离太阳第几近？", "{s}离太阳{a}近。"),
            ("从太阳往外数，{s}排第几？", "从太阳往外数，{s}排{a}。"),
            ("{s}是太阳系的第几颗行星？", "{s}是太阳系的{a}颗行星。"),
            ("请问{s}是离太阳第几近的行星？", "{s}是离太阳{a}近的行星。"),
            ("你知道{s}离太阳第几近吗？", "知道，{s}离太阳{a}近。"),
            ("太阳系的行星里{s}排第几？", "太阳系的行星里{s}排{a}。"),
        ),
        statements=(
            "从太阳往外数，{s}排{a}。",
            "{s}是太阳系的{a}颗行星。",
            "{s}是离太阳{a}近的行星。",
        ),
    ),
    Relation(
        name="zodiac",
        kind="zodiac",
        facts=pairs(facts.ZODIAC),
        exam="civil_servant",
        questions=(
            ("十二生肖里{s}排第几？", "十二生肖里{s}排{a}。"),
            ("{s}在十二生肖中是第几位？", "{s}在十二生肖中是{a}位。"),
            ("生肖{s}排在第几位？", "生肖{s}排在{a}位。"),
            ("请问生肖里的{s}排第几？", "生肖里的{s}排{a}。"),
            ("你知道生肖{s}排第几吗？", "知道，生肖{s}排{a}。"),
            ("{s}是十二生肖的第几个？", "{s}是十二生肖的{a}个。"),
        ),
        statements=("十二生肖里{s}排{a}。", "生肖{s}排在{a}位。", "{s}是十二生肖的{a}个。"),
    ),
    Relation(
        name="animal",
        kind="animal",
        facts=pairs(facts.ANIMALS),
        exam="civil_servant",
        questions=(
            ("{s}是哪一类动物？", "{s}是{a}。"),
            ("{s}属于什么动物？", "{s}属于{a}。"),
            ("{s}在动物分类里算哪一类？", "{s}算{a}。"),
            ("请问{s}属于哪一类？", "{s}属于{a}。"),
            ("你知道{s}是哪类动物吗？", "知道，{s}是{a}。"),
            ("{s}可以归到哪一类动物？", "{s}可以归到{a}。"),
            ("告诉我{s}属于哪类动物。", "{s}属于{a}。"),
        ),
        statements=("{s}是{a}。", "{s}属于{a}。", "{a}里有一种是{s}。"),
    ),
    Relation(
        name="square",
        kind="number",
        facts=pairs(facts.SQUARES),
        exam="middle_school_mathematics",
        questions=(
            ("{s}的平方是多少？", "{s}的平方是{a}。"),
            ("{s}的平方等于几？", "{s}的平方等于{a}。"),
            ("{s}的平方得多少？", "{s}的平方得{a}。"),
            ("请问{s}的平方是几？", "{s}的平方是{a}。"),
            ("你知道{s}的平方吗？", "知道，{s}的平方是{a}。"),
            ("算一算{s}的平方。", "{s}的平方是{a}。"),
        ),
        statements=("{s}的平方是{a}。", "{s}乘{s}等于{a}。", "{a}是{s}的平方。"),
    ),
    Relation(
        name="to_english",
        kind="chinese_word",
        facts=pairs(facts.WORDS),
        questions=(
            ("{s}用英语怎么说？", "{s}用英语说是{a}。"),
            ("{s}的英语是什么？", "{s}的英语是{a}。"),
            ("{s}的英文怎么写？", "{s}的英文写作{a}。"),
            ("请问英语里{s}怎么说？", "英语里{s}说{a}。"),
            ("你知道{s}的英语吗？", "知道，{s}的英语是{a}。"),
            ("哪个英语单词表示{s}？", "表示{s}的英语单词是{a}。"),
            ("请把{s}翻译成英语。", "{s}翻译成英语是{a}。"),
        ),
        statements=("{s}的英语是{a}。", "英语里{s}说{a}。", "{s}翻译成英语是{a}。"),
    ),
    Relation(
        name="to_chinese",
        kind="english_word",
        facts=tuple(Fact(english, (chinese,)) for chinese, english in facts.WORDS.items()),
        questions=(
            ("{s}是什么意思？", "{s}的意思是{a}。"),
            ("英语单词{s}是什么意思？", "英语单词{s}的意思是{a}。"),
            ("{s}用中文怎么说？", "{s}用中文说是{a}。"),
            ("请问{s}的中文是什么？", "{s}的中文是{a}。"),
            ("你知道{s}的意思吗？", "知道，{s}的意思是{a}。"),
            ("请把{s}翻译成中文。", "{s}翻译成中文是{a}。"),
            ("{s}这个词怎么翻译？", "{s}这个词翻译成{a}。"),
        ),
        statements=("{s}的意思是{a}。", "英语单词{s}的中文是{a}。", "{s}翻译成中文是{a}。"),
    ),
    Relation(
        name="english_capital",
        kind="english_country",
        facts=tuple(
            Fact(row[3], (row[4],)) for row in facts.COUNTRIES.values() if row[3] and row[4]
        ),
        questions=(
            ("What is the capital of {s}?", "The capital of {s} is {a}."),
            ("Which city is the capital of {s}?", "The capital of {s} is {a}."),
            ("Can you name the capital of {s}?", "Yes, the capital of {s} is {a}."),
            ("Tell me the capital of {s}.", "The capital of {s} is {a}."),
            ("Do you know the capital of {s}?", "Yes, the capital of {s} is {a}."),
            ("What city is the capital of {s}?", "The capital of {s} is {a}."),
        ),
        next=ENGLISH_NEXT,
        statements=(
            "The capital of {s} is {a}.",
            "{a} is the capital of {s}.",
            "The capital city of {s} is called {a}.",
        ),
        language="en",
        stop=".",
    ),
    Relation(
        name="english_opposite",
        kind="english_adjective",
        facts=pairs(facts.ENGLISH_OPPOSITES),
        questions=(
            ("What is the opposite of {s}?", "The opposite of {s} is {a}."),
            ("Which word is the opposite of {s}?", "The opposite of {s} is {a}."),
            ("Can you name the opposite of {s}?", "Yes, the opposite of {s} is {a}."),
            ("Tell me the opposite of {s}.", "The opposite of {s} is {a}."),
            ("Do you know the opposite of {s}?", "Yes, the opposite of {s} is {a}."),
            ("What word means the opposite of {s}?", "The opposite of {s} is {a}."),
        ),
        next=ENGLISH_NEXT,
        statements=(
            "The opposite of {s} is {a}.",
            "The words {s} and {a} are opposites.",
            "If it is not {s}, it may be {a}.",
        ),
        language="en",
        stop=".",
    ),
)
