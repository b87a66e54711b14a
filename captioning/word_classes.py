"""Kinds of words in English captions, from closed lists and endings: coarse, and the same on every machine.

A word's class depends on its spelling and on the vocabulary alone, not on its sentence. Whatever stands in no list and
has no verb's ending counts as a noun: docs/diagnostics.md says how often that is wrong.
"""

from collections.abc import Sequence

ARTICLE, PLACE, FUNCTION, QUALITY, VERB, NOUN, OTHER = CLASSES = (
    "article",  # and other determiners
    "place",  # prepositions, and nouns that name a place rather than a thing: left, top, side
    "function",  # conjunctions, pronouns, auxiliaries
    "quality",  # colours, numbers, sizes, ages
    "verb",
    "noun",
    "other",  # <end>, <unk>, and words that may be noun or verb: ski, race
)

_LISTS = {
    ARTICLE: """
        a an the this that these those some any each every another other others his her its their my your our no
        all both""",
    PLACE: """
        above across after against ahead along alongside among amongst around as at atop away back before behind
        below beneath beside besides between beyond bottom by center centre down during edge for forward from
        front in inside into left like middle near nearby next of off on onto opposite out outside outdoors over
        overhead part past right side sides through to together top toward towards under underneath up upon
        upside upward via while whilst with within without""",
    FUNCTION: """
        about also am and anything are be because been being but can could did do does everyone few had has have
        he herself him himself how i if is it itself just many me more most n't nobody not nothing one only or
        's several she so someone somebody something than them themselves then there they too us very was we
        were what when where which who whom whose will would you""",
    QUALITY: """
        adult african airborne american asian bald beautiful big black blond blonde blue bright brown busy clear
        cloudy cold colored colorful colourful cream crowded cute dark deep dirty dry eight elderly empty fallen
        fat female filled five fluffy four full furry german golden grassy gray green grey haired half hard high
        hot huge inflatable large leather light little lone long low male medium metal muddy multicolored narrow
        new nine old older open orange outdoor pink plaid plastic pretty purple ready red rocky rural sandy
        seven shaggy shallow shiny shirtless short six skinny small snowy spotted steep striped stuffed sunny
        tall tan teenage ten thin three tiny two urban wet white wide wild wooded wooden yellow young younger""",
    VERB: """
        bite bites caught dressed get gets goes gone got held knocked laid lays leapt let lets lies lit made ran rode
        sat seen shown sing sting stood took went wore worn""",
    NOUN: """
        awning backpack backpacks bike bikes box building buildings canoe ceiling clothing earring evening face
        faces fence fish hand hands hoop hoops kayak king leaves lightning lights morning opening painting park
        railing rigging ring siding skateboard skateboards sled snowboard snowboards spring steps stick sticks
        street string swing swings thing train viking water waters wave waves wedding wing""",
}
_LISTED = {word: name for name, words in _LISTS.items() for word in words.split()}
_ENDINGS = (("s", ""), ("es", ""), ("ies", "y"), ("ed", ""), ("ed", "e"), ("ied", "y"))


def classify(words: Sequence[str]) -> list[str]:
    """The class of every word of a vocabulary.

    Args:
        words: all its words, in lower case; that a verb's form in -ing is among them tells its other forms from nouns.

    Returns:
        One of CLASSES for each.
    """
    participles = frozenset(word for word in words if _is_participle(word))
    return [_class_of(word, participles) for word in words]


def _class_of(word: str, participles: frozenset[str]) -> str:
    if word in _LISTED:
        return _LISTED[word]
    if word.startswith("<") or not any(letter.isalpha() for letter in word):
        return OTHER
    if _is_participle(word):
        return VERB
    if _in_ing(word) & participles:
        return OTHER  # "a swim", "they swim"
    stems = [word.removesuffix(ending) + put for ending, put in _ENDINGS if word.endswith(ending)]
    if any(_in_ing(stem) & participles for stem in stems):
        return VERB
    return NOUN


def _is_participle(word: str) -> bool:
    return word.endswith("ing") and len(word) > 4 and word not in _LISTED


def _in_ing(verb: str) -> set[str]:
    """How the form in -ing of a verb may be spelt: walk(ing), rid(ing), run(n)(ing), l(ying)."""
    forms = {verb + "ing"}
    if verb:
        forms.add(verb + verb[-1] + "ing")
    if verb.endswith("e"):
        forms.add(verb[:-1] + "ing")
    if verb.endswith("ie"):
        forms.add(verb[:-2] + "ying")
    return forms
