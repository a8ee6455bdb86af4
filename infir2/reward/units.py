"""Words behind a number: do they name what it counts or measures, so that the number alone says the same?

Other letters may be factors: 10ab is not 10, nor is 2pi 2. And some words are part of the number: 5 thousand is not 5.
"""

import re

_LISTED = """
m g s h l mm cm dm km nm mg kg lb lbs oz ml cl dl kl in ft yd mi mph kph kmh sq cu hr hrs min mins sec secs ms mol rad
deg amp ohm hz khz mhz ghz kw kwh mw kj kcal cal ev pa kpa mpa bar atm rpm mpg usd eur bit byte
meter metre centimeter centimetre millimeter millimetre kilometer kilometre inch foot feet yard mile
gram kilogram milligram ton tonne pound ounce liter litre milliliter millilitre gallon quart pint cup
second minute hour day week month months year degree radian percent dollar cent euro penny unit
square cubic per mole kelvin celsius fahrenheit newton joule watt volt hertz
people person child children man men woman women sheep fish way path paths length lengths
positive negative distinct different possible real ordered whole
"""
_UNITS = frozenset(_LISTED.split())
_PLURAL = re.compile(r"(?=[a-z]*[aeiouy])[a-z]{3,}s")
_NUMBERS = re.compile(r"(?:[a-z]+th|half|halve|third|quarter|ten|dozen|score|hundred|thousand|[a-z]+illion)s?")
_WORDS = re.compile(r"[a-zA-Z]+(?:[ ./-]+[a-zA-Z]+)*\.?")


def is_unit(text: str) -> bool:
    """Whether all words of the text ("square units", "km/h", "apples") are units, or nouns in the plural."""
    if not _WORDS.fullmatch(text.strip()):
        return False
    words = (word.lower() for word in re.findall("[a-zA-Z]+", text))
    return all(word in _UNITS or (_PLURAL.fullmatch(word) and not _NUMBERS.fullmatch(word)) for word in words)
