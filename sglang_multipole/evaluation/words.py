"""Words for keys: an adjective and a noun name one thing."""

from __future__ import annotations

_ADJECTIVES = """
able agile amber ample ancient arctic ardent ashen autumn azure bald bitter blank bleak blunt bold
brave breezy brief bright brisk broad bronze calm candid careful chilly civil clean clear clever
cloudy coarse cobalt cold coral cosmic crimson crisp curious damp daring dark deep dense distant
double dry dusty eager early earnest east elder empty exact faint fair famous fancy fast fertile
fierce final fine firm flat fluent fond formal frail frank fresh frosty gentle giant gifted glad
global golden grand grave green grim hardy hasty heavy hidden high hollow honest humble icy idle
inner ivory jolly keen kind large late lazy light lively local lonely long loud loyal lucky lunar
major mellow merry mild minor misty modern modest narrow neat noble north novel oblique odd olive
open orange outer pale patient plain polar polite prime proud purple quick quiet rapid rare ready
remote rich rigid ripe robust rough round royal rural rusty safe salty sharp shiny short shy silent
silver simple sleepy slim slow smooth snowy soft solar solid sour south spare stable steady steep
stern still stout strict sturdy subtle sudden sunny sweet swift tall tame tender thick thin tidy
timid tiny urban vague vast vivid warm weary west white wide wild windy wise witty young
"""

_NOUNS = """
acorn anchor apple arrow atlas badge barley barn basin basket beacon beaver bell berry birch bishop
blanket blossom bottle boulder branch brick bridge bucket button cabin cactus camel candle canoe
canyon captain carpet carrot castle cellar chalk chapel cherry chimney circle clock cloud clover
coast coffee comet compass cottage cradle crane crater creek cricket crown curtain daisy desert
diamond dolphin donkey dragon drum eagle easel elbow ember engine falcon farmer feather fence fern
ferry fiddle field finger flag flute forest fossil fountain fox garden garlic gate ginger glacier
glove goose granite grape guitar hammer harbor harvest hazel heron hill hive honey horizon horse
island jacket jaguar jungle kettle kitten ladder lagoon lake lantern lemon leopard library lily
lizard lobster locket maple marble market meadow melon mirror monkey mountain mushroom nectar
needle nest oasis ocean orchard orchid otter owl oyster paddle palace panda paper parrot peach
pebble pelican pencil pepper piano pigeon pillow pine pirate planet plum pocket pond poppy prairie
pumpkin puzzle quarry rabbit radish raven ribbon river robin rocket saddle sailor salmon sandal
school scissor shadow shell shepherd signal spider spoon spruce squirrel station stone storm stove
summit swan table teapot temple thistle thread thunder ticket tiger timber tower trumpet tulip
tunnel turtle valley velvet village violin walnut wagon walrus whale wheat willow window winter
wolf wren zebra
"""

ADJECTIVES = _ADJECTIVES.split()
NOUNS = _NOUNS.split()
NUM_KEYS = len(ADJECTIVES) * len(NOUNS)


def key(number: int) -> str:
    """The key with this number, from 0 to NUM_KEYS - 1."""
    return f"{ADJECTIVES[number // len(NOUNS)]}-{NOUNS[number % len(NOUNS)]}"
