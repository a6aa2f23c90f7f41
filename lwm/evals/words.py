"""Names and words that evaluations hide and ask for."""

import itertools
import random


def _listed(text: str, separator: str | None = None) -> tuple[str, ...]:
  return tuple(" ".join(entry.split()) for entry in text.split(separator))


# Cities of LWM's needles (LWM, `scripts/eval_needle.py`), each once.
CITIES = _listed(
  """
  Chicago, Yangon, Antananarivo, Colombo, Almaty, Sydney, Mexico City, Seattle, Lagos, Amsterdam,
  Belgrade, Cairo, Baghdad, Damascus, Kigali, Dakar, Sofia, Victoria, Tashkent, Mumbai, Barcelona,
  Amman, Toronto, Bratislava, Johannesburg, Thimphu, Bangkok, Santiago, San Francisco, Paris, Rabat,
  Copenhagen, Madrid, Ho Chi Minh City, Sarajevo, Delhi, Istanbul, Khartoum, Helsinki, Doha,
  Kuala Lumpur, Budapest, Shanghai, Moscow, Los Angeles, Oslo, Berlin, Bangalore, Tokyo, Melbourne,
  Port Louis, Lisbon, Nairobi, Kampala, Lima, Maputo, Vancouver, Dubai, Jakarta, Yerevan, Beirut,
  Athens, Bucharest, Brussels, Tunis, Astana, Seoul, Buenos Aires, Vienna
  """,
  ",",
)

# Landmarks and their countries. A person who lives next to one has been to the other.
LANDMARKS = (
  ("the Eiffel Tower", "France"),
  ("the Colosseum", "Italy"),
  ("the Brandenburg Gate", "Germany"),
  ("the Taj Mahal", "India"),
  ("the pyramids of Giza", "Egypt"),
  ("Red Square", "Russia"),
  ("the Acropolis", "Greece"),
  ("Machu Picchu", "Peru"),
  ("the Forbidden City", "China"),
  ("Mount Fuji", "Japan"),
  ("Big Ben", "England"),
  ("the Statue of Liberty", "the United States"),
  ("the Sagrada Familia", "Spain"),
  ("Angkor Wat", "Cambodia"),
)
# Names that old novels do not use.
NAMES = _listed("Yuki Katherina Diallo Chaim Veronika Gunnar Megumi Tendai Ximena Oksana Bogdan")

ADJECTIVES = _listed(
  """
  able bold brave bright calm clean clever cold cool crisp curly damp dark deep dense dry dull eager
  early easy fair fancy fast fierce fine firm flat fresh gentle giant glad golden grand green happy
  hard heavy hollow honest hot huge humble icy jolly keen kind large late lazy light little lively
  lonely long loud lucky mellow mild narrow neat new noble old pale plain polite proud pure quick
  quiet rapid rare rich ripe rough round royal sharp shiny short silent silver simple slow small
  smooth soft solid sour steady steep strong sturdy sweet swift tall tame tender thick thin tiny
  warm wide wild wise young
  """
)
NOUNS = _listed(
  """
  acorn anchor apple arrow badge banjo barrel basket beach bell bench berry bird blanket boat book
  bottle branch bread brick bridge brush bucket butter button cabin cactus camel candle canyon
  carpet castle cellar chain chair cherry circle clock cloud coat coin comet copper corn cotton
  crane crown desert dolphin donkey door dragon drum eagle engine falcon feather fence ferry field
  flag flute forest fork fountain fox garden gate glove goat grape hammer harbor hat hawk helmet
  hill honey horse island jacket jewel kettle kite ladder lake lamp lemon letter lion lizard lobster
  magnet map marble meadow mirror monkey moon needle nest ocean olive onion orange otter oven owl
  paddle palace panda paper parrot pearl pebble pencil pepper piano pillow planet plate pocket pond
  potato puzzle rabbit radio river robin rocket saddle sail salad school shadow sheep shell ship
  silk spider spoon spring stable star statue stone street sugar table temple thunder ticket tiger
  tower tractor train tree trumpet tunnel turtle valley velvet village violin wagon walnut water
  whale wheel window winter wolf zebra
  """
)


def compounds() -> list[str]:
  """Adjectives and nouns joined as RULER's keys are: "bright-river"."""
  return [f"{adjective}-{noun}" for adjective, noun in itertools.product(ADJECTIVES, NOUNS)]


def sample_words(random: random.Random, count: int) -> list[str]:
  """Different words; after the first few hundred, compounds, and then those with another noun."""
  simple, pairs = ADJECTIVES + NOUNS, compounds()
  words = random.sample(simple, min(count, len(simple)))
  words += random.sample(pairs, min(count - len(words), len(pairs)))
  further = random.sample(range(len(pairs) * len(NOUNS)), count - len(words))
  return words + [f"{pairs[index // len(NOUNS)]}-{NOUNS[index % len(NOUNS)]}" for index in further]


def number(random: random.Random) -> str:
  """A number of seven digits."""
  return str(random.randint(10**6, 10**7 - 1))


def uuid4(random: random.Random) -> str:
  """A random UUID of version 4."""
  digits = f"{random.getrandbits(128):032x}"
  variant = "89ab"[random.getrandbits(2)]
  groups = (digits[:8], digits[8:12], f"4{digits[13:16]}", f"{variant}{digits[17:20]}", digits[20:])
  return "-".join(groups)
