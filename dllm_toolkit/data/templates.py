"""The wording of story arithmetic: people, things, and for each kind of step several ways to tell it.

A wording is a pair (sentence of the question, sentence or sentences of the worked solution). The pair is
the point: the solution's words are decided by the question's words, so an exact match with the reference is
a fair measure, and a model that decodes many tokens at once has text that it can predict.

Slots. {A} the person acting now, {he} {He} {him} {his} {His} that person's pronouns, {S} that person as a
subject with a varying connective ("Later, she"), {B} somebody who is compared with {A}, {O} the person of
an earlier comparison, {C} a third person, {X} {Y} whoever of {A} and {O} has more and fewer; {items} {box}
{boxes} {place} {thing} {things} {red} {blue} the objects. Numbers: {v} the running value, {n} {k} {g}
numbers given in the question, {m} a product, {f} the value at the start of the story, {w} the value of {O},
{a} {b} the larger and smaller of {v} and {w}, {r} the result.

In the solution every step is an equation `a op b = c` with op one of + - x /.
"""

# A wording is easiest to check when its two halves stand on one line.
# ruff: noqa: E501
# fmt: off

from __future__ import annotations

Wordings = tuple[tuple[str, str], ...]

PROMPT = "Question: {question} Answer:"
CLOSING = "The answer is {r}."

GIRLS = ("Mia", "Ana", "Zoe", "Lily", "Emma", "Nora", "Ruth", "Ivy", "Sara", "Kate", "Rosa", "Lena", "Maya", "Tina")
BOYS = ("Tom", "Ben", "Leo", "Sam", "Max", "Noah", "Omar", "Jack", "Finn", "Hugo", "Ravi", "Luke", "Adam", "Erik")
# he, He, him, his, His
PRONOUNS = (("she", "She", "her", "her", "Her"), ("he", "He", "him", "his", "His"))
ITEMS = (
    "shells", "marbles", "stickers", "coins", "cards", "stamps", "beads", "buttons", "pencils", "books", "apples",
    "plums", "cookies", "eggs", "roses", "balloons", "candles", "toys", "stones", "ribbons", "muffins", "lemons",
    "postcards", "magnets",
)
BOXES = (("box", "boxes"), ("bag", "bags"), ("jar", "jars"), ("basket", "baskets"), ("tin", "tins"), ("crate", "crates"))
PLACES = ("at the park", "at school", "at the market", "near the lake", "in the garden", "at the fair", "on the bus")
THINGS = (("hat", "hats"), ("kite", "kites"), ("lamp", "lamps"), ("game", "games"), ("ball", "balls"), ("scarf", "scarves"))
COLORS = ("red", "blue", "green", "white", "yellow", "black")
SUBJECTS = (
    "{He}", "{A}", "Then {he}", "Then {A}", "Later, {he}", "After that, {he}", "Next, {he}", "The next day {he}",
)

START: Wordings = (
    ("{A} has {r} {items}.", ""),
    ("{A} starts with {r} {items}.", ""),
    ("{A} owns {r} {items}.", ""),
    ("There are {r} {items} in {A}'s {box}.", ""),
    ("{A} brings {r} {items} from home.", ""),
)
START_BOXES: Wordings = (
    ("{A} has {k} {boxes} with {n} {items} in each.", "The {k} {boxes} hold {n} x {k} = {r} {items}."),
    ("There are {n} {items} in each of {A}'s {k} {boxes}.", "{A} has {n} x {k} = {r} {items} in the {boxes}."),
    ("{A} fills {k} {boxes}, and each {box} holds {n} {items}.", "Each {box} holds {n}, so that is {n} x {k} = {r} {items}."),
    ("{A} puts {items} in {k} rows of {n}.", "The {k} rows have {n} x {k} = {r} {items}."),
)
START_GROUPS: Wordings = (
    ("{A} has {n} {red} and {k} {blue} {items}.", "{A} has {n} + {k} = {r} {items} in all."),
    ("{A} owns {n} {red} {items} and {k} {blue} ones.", "The {red} and {blue} ones together are {n} + {k} = {r} {items}."),
    ("In {A}'s {box} there are {n} {red} {items} and {k} {blue} ones.", "The {box} holds {n} + {k} = {r} {items}."),
    ("{A} buys {n} {items} on Monday and {k} on Tuesday.", "In the two days {he} buys {n} + {k} = {r} {items}."),
)

GAIN: Wordings = (
    ("{S} buys {n} more {items}.", "{A} buys {n} more, so {he} has {v} + {n} = {r} {items}."),
    ("{S} finds {n} {items} {place}.", "Finding {n} brings {him} to {v} + {n} = {r} {items}."),
    ("{C} gives {him} another {n} {items}.", "With the {n} from {C}, {A} has {v} + {n} = {r} {items}."),
    ("{S} gets {n} more {items} as a gift.", "The gift makes that {v} + {n} = {r} {items}."),
    ("{S} wins {n} {items} in a game.", "{He} wins {n}, which makes {v} + {n} = {r} {items}."),
)
LOSE: Wordings = (
    ("{S} loses {n} of them.", "{A} loses {n}, so {v} - {n} = {r} {items} are left."),
    ("{S} sells {n} {items} {place}.", "Selling {n} leaves {him} with {v} - {n} = {r} {items}."),
    ("{S} throws out {n} old {items}.", "Without the {n} old ones there are {v} - {n} = {r} {items}."),
    ("{S} leaves {n} of the {items} {place}.", "{A} leaves {n} behind and keeps {v} - {n} = {r} {items}."),
    ("{S} drops {n} {items} into the river.", "The river takes {n}, so {he} has {v} - {n} = {r} {items}."),
)
GIVE: Wordings = (
    ("{S} gives {n} {items} to {C}.", "After giving {C} {n}, {he} has {v} - {n} = {r} {items}."),
    ("{C} takes {n} of them.", "{C} takes {n}, which leaves {v} - {n} = {r} {items}."),
    ("{S} lends {n} {items} to {C}.", "{A} lends {n} to {C} and still has {v} - {n} = {r}."),
    ("{C} asks for {n} {items}, and {he} hands them over.", "{He} hands over {n}, so {he} keeps {v} - {n} = {r} {items}."),
)
RECALL_GAIN: Wordings = (
    ("{S} finds as many {items} as {he} had at first.", "At first {he} had {f}, so now {he} has {v} + {f} = {r} {items}."),
    ("{C} gives {him} as many {items} as {he} started with.", "{He} started with {f}, so {C} brings {him} to {v} + {f} = {r}."),
    ("{S} buys the same number that {he} had in the beginning.", "In the beginning it was {f}, which makes {v} + {f} = {r} {items}."),
    ("{S} gets a gift as big as {his} first pile.", "The first pile was {f}, so the gift makes {v} + {f} = {r} {items}."),
)
RECALL_GIVE: Wordings = (
    ("{S} sells as many {items} as {he} had at first.", "At first {he} had {f}, so {v} - {f} = {r} {items} are left."),
    ("{C} takes as many {items} as {he} started with.", "{He} started with {f}, so {C} leaves {him} {v} - {f} = {r}."),
    ("{S} gives away the same number that {he} had in the beginning.", "In the beginning it was {f}, so {he} keeps {v} - {f} = {r}."),
    ("{S} loses a pile as big as {his} first one.", "The first pile was {f}, so {he} still has {v} - {f} = {r} {items}."),
)
BOXES_GAIN: Wordings = (
    ("{S} buys {k} {boxes} with {n} {items} each.", "The {boxes} hold {n} x {k} = {m} {items}. Now {he} has {v} + {m} = {r} {items}."),
    ("{S} opens {k} {boxes}, and each {box} holds {n} more {items}.", "That is {n} x {k} = {m} more {items}. In all {he} has {v} + {m} = {r}."),
    ("{C} brings {him} {k} {boxes} of {n} {items}.", "{C} brings {n} x {k} = {m} {items}. With them {A} has {v} + {m} = {r}."),
    ("{S} gets {n} {items} from each of {k} friends.", "The friends give {n} x {k} = {m} {items}. That makes {v} + {m} = {r} {items}."),
)
DAYS_GAIN: Wordings = (
    ("Every day for {k} days {he} collects {n} more {items}.", "In {k} days {he} collects {n} x {k} = {m}. This brings {him} to {v} + {m} = {r} {items}."),
    ("{S} adds {n} {items} a week for {k} weeks.", "{A} adds {n} x {k} = {m} {items}. After {k} weeks {he} has {v} + {m} = {r}."),
    ("On each of the next {k} days {he} wins {n} {items}.", "{He} wins {n} x {k} = {m} {items}. Then {he} has {v} + {m} = {r} {items}."),
    ("{S} visits {k} shops and buys {n} {items} in each.", "The {k} shops sell {him} {n} x {k} = {m}. So {A} has {v} + {m} = {r} {items}."),
)
DAYS_USE: Wordings = (
    ("{S} uses {n} {items} a day for {k} days.", "In {k} days {he} uses {n} x {k} = {m}. That leaves {v} - {m} = {r} {items}."),
    ("Every day for {k} days {he} sells {n} {items}.", "{A} sells {n} x {k} = {m} {items}. Then {he} has {v} - {m} = {r} left."),
    ("{S} loses {n} {items} a week for {k} weeks.", "{He} loses {n} x {k} = {m} {items}. So {v} - {m} = {r} {items} are left."),
    ("On each of the next {k} days {C} takes {n} of them.", "{C} takes {n} x {k} = {m} {items}. This leaves {A} with {v} - {m} = {r}."),
)
HAND_OUT: Wordings = (
    ("{S} gives {n} {items} to each of {k} friends.", "The {k} friends get {n} x {k} = {m} {items}. {A} keeps {v} - {m} = {r}."),
    ("{S} fills {k} {boxes} with {n} {items} each for a sale.", "The {boxes} take {n} x {k} = {m} {items}. Without them {he} has {v} - {m} = {r}."),
    ("{k} friends come and take {n} {items} each.", "They take {n} x {k} = {m} {items}. So {he} still has {v} - {m} = {r} {items}."),
    ("{S} sends {k} letters with {n} {items} in each.", "The letters hold {n} x {k} = {m} {items}. That leaves {him} {v} - {m} = {r}."),
)
DOUBLE: Wordings = (
    ("{S} doubles the number of {items}.", "Doubling makes {v} x 2 = {r} {items}."),
    ("By Friday {he} has twice as many.", "Twice as many is {v} x 2 = {r} {items}."),
    ("{C} gives {him} just as many as {he} has now.", "With just as many from {C}, {he} has {v} x 2 = {r} {items}."),
    ("In a month {his} pile grows to double the size.", "The pile grows to {v} x 2 = {r} {items}."),
)
TIMES: Wordings = (
    ("By Friday {he} has {k} times as many.", "By Friday {A} has {v} x {k} = {r} {items}."),
    ("In a month {his} pile grows to {k} times the size.", "The pile grows to {v} x {k} = {r} {items}."),
    ("{S} works hard until there are {k} times as many {items}.", "{His} hard work makes that {v} x {k} = {r} {items}."),
    ("{S} trades each of them for {k} smaller {items}.", "The trade gives {him} {v} x {k} = {r} smaller {items}."),
)
HALF: Wordings = (
    ("{S} sells half of {his} {items}.", "{He} sells half, so {v} / 2 = {r} {items} are left."),
    ("{S} gives half of them to {C}.", "{C} gets half, and {A} keeps {v} / 2 = {r} {items}."),
    ("Half of {his} {items} get lost.", "Losing half leaves {him} with {v} / 2 = {r} {items}."),
    ("{S} keeps only half of them.", "Half of them is {v} / 2 = {r} {items}."),
)
THIRD: Wordings = (
    ("{S} keeps only a third of them.", "A third of them is {v} / 3 = {r} {items}."),
    ("{S} makes 3 equal piles and keeps one of them.", "{He} keeps one pile, which has {v} / 3 = {r} {items}."),
    ("Only a third of {his} {items} are still good.", "The good ones are {v} / 3 = {r} {items}."),
    ("{S} shares them with 2 friends, so that all 3 have the same number.", "Each of the 3 has {v} / 3 = {r} {items}."),
)

MORE: Wordings = (
    ("{B} has {n} more {items} than {A}.", "{B} has {n} more, so {B} has {v} + {n} = {r} {items}."),
    ("{B} owns as many {items} as {A} and {n} more.", "That gives {B} {v} + {n} = {r} {items}."),
    ("{A} has {n} {items} fewer than {B}.", "{A} has {n} fewer, so {B} has {v} + {n} = {r} {items}."),
    ("{A} would need {n} more {items} to have as many as {B}.", "{B} must have {v} + {n} = {r} {items}."),
)
FEWER: Wordings = (
    ("{B} has {n} fewer {items} than {A}.", "{B} has {n} fewer, so {B} has {v} - {n} = {r} {items}."),
    ("{A} has {n} {items} more than {B}.", "{A} has {n} more, so {B} has {v} - {n} = {r} {items}."),
    ("{B} would need {n} more {items} to have as many as {A}.", "{B} must have {v} - {n} = {r} {items}."),
    ("{B} counts {items} too and gets {n} less than {A}.", "{B} counts {v} - {n} = {r} {items}."),
)
TIMES_AS_MANY: Wordings = (
    ("{B} has {k} times as many {items} as {A}.", "{B} has {k} times as many, which is {v} x {k} = {r} {items}."),
    ("For each of {A}'s {items}, {B} has {k}.", "{B} has {k} for each one, so {v} x {k} = {r} {items}."),
    ("{B} owns {k} {items} for every one that {A} has.", "That gives {B} {v} x {k} = {r} {items}."),
    ("{B}'s pile is {k} times the size of {A}'s.", "{B}'s pile has {v} x {k} = {r} {items}."),
)
TWICE_AS_MANY: Wordings = (
    ("{B} has twice as many {items} as {A}.", "{B} has twice as many, which is {v} x 2 = {r} {items}."),
    ("{A} has only half as many {items} as {B}.", "{A} has half as many, so {B} has {v} x 2 = {r} {items}."),
    ("{B} owns double the number that {A} has.", "Double the number gives {B} {v} x 2 = {r} {items}."),
    ("{B}'s pile is twice the size of {A}'s.", "{B}'s pile has {v} x 2 = {r} {items}."),
)
HALF_AS_MANY: Wordings = (
    ("{B} has half as many {items} as {A}.", "{B} has half as many, which is {v} / 2 = {r} {items}."),
    ("{A} has twice as many {items} as {B}.", "{A} has twice as many, so {B} has {v} / 2 = {r} {items}."),
    ("{B} owns half of the number that {A} has.", "Half of the number gives {B} {v} / 2 = {r} {items}."),
    ("{B}'s pile is half the size of {A}'s.", "{B}'s pile has {v} / 2 = {r} {items}."),
)
COMBINE: Wordings = (
    ("{O} gives all of {O}'s {items} to {A}.", "With the {w} from {O}, {A} now has {w} + {v} = {r} {items}."),
    ("{A} gets everything that {O} has.", "{O} had {w}, so {A} gets to {w} + {v} = {r} {items}."),
    ("{O} leaves, and {A} keeps the {items} of both.", "From both piles {A} keeps {w} + {v} = {r} {items}."),
    ("{A} adds {O}'s {items} to {his} own.", "{O}'s {w} and {his} own make {w} + {v} = {r} {items}."),
)
TOGETHER: Wordings = (
    ("How many {items} do {O} and {A} have together?", "Together they have {w} + {v} = {r} {items}."),
    ("How many {items} do the two have in all?", "In all the two have {w} + {v} = {r} {items}."),
    ("What is the total number of {items} that both have?", "The total of both is {w} + {v} = {r} {items}."),
    ("They put all their {items} in one {box}. How many are in it?", "The {box} holds {w} + {v} = {r} {items}."),
)
DIFFERENCE: Wordings = (
    ("How many more {items} does {X} have than {Y}?", "{X} has {a} - {b} = {r} more {items} than {Y}."),
    ("How many fewer {items} does {Y} have than {X}?", "{Y} has {a} - {b} = {r} fewer {items} than {X}."),
    ("What is the difference between {X} and {Y} now?", "The difference is {a} - {b} = {r} {items}."),
    ("How many {items} must {Y} get to have as many as {X}?", "{Y} must get {a} - {b} = {r} {items}."),
)

GOAL: Wordings = (
    ("{S} wants to have {g} {items}. How many more does {he} need?", "To have {g}, {A} needs {g} - {v} = {r} more {items}."),
    ("{His} {box} has room for {g} {items}. How many more fit in it?", "The {box} has room for {g} - {v} = {r} more {items}."),
    ("How many {items} must {he} still buy to own {g}?", "{He} must still buy {g} - {v} = {r} {items}."),
    ("How many {items} short of {g} is {A} now?", "{A} is {g} - {v} = {r} {items} short of {g}."),
)
SHARE: Wordings = (
    ("{S} shares them equally among {k} friends. How many does each get?", "Each of the {k} friends gets {v} / {k} = {r} {items}."),
    ("{S} splits all of them into {k} equal piles. How many {items} are in a pile?", "One pile has {v} / {k} = {r} {items}."),
    ("If {k} friends take the same number and none are left, how many does each take?", "Each friend takes {v} / {k} = {r} {items}."),
    ("All {items} go into {k} {boxes}, the same number in each. How many are in a {box}?", "Each {box} holds {v} / {k} = {r} {items}."),
)
PACK: Wordings = (
    ("{S} packs them in {boxes} of {k}. How many {boxes} does {he} fill?", "{He} fills {v} / {k} = {r} {boxes}."),
    ("Each {box} holds {k} {items}. How many {boxes} are needed?", "With {k} in each, {v} / {k} = {r} {boxes} are needed."),
    ("{S} uses {k} of them a day. For how many days do they last?", "They last for {v} / {k} = {r} days."),
    ("{S} puts {k} {items} in a row. How many rows are there?", "There are {v} / {k} = {r} rows."),
)
ASK: Wordings = (
    ("How many {items} does {he} have now?", ""),
    ("How many {items} does {A} have in the end?", ""),
    ("What is the number of {items} that {A} has now?", ""),
    ("Find out how many {items} {he} has at the end.", ""),
)

SELL: Wordings = (
    ("{S} sells all of them for {k} dollars each.", "Selling all of them brings {v} x {k} = {r} dollars."),
    ("A shop pays {him} {k} dollars for each one.", "The shop pays {him} {v} x {k} = {r} dollars."),
    ("Each one costs {k} dollars, and {C} buys them all.", "{C} pays {A} {v} x {k} = {r} dollars for them."),
    ("{S} gets {k} dollars for every one of the {items}.", "For the {items} {he} gets {v} x {k} = {r} dollars."),
)
EARN: Wordings = (
    ("{S} earns {n} more dollars {place}.", "{A} earns {n} more, so {he} has {v} + {n} = {r} dollars."),
    ("{C} gives {him} {n} dollars more.", "With the {n} dollars from {C}, {he} has {v} + {n} = {r}."),
    ("{S} had saved {n} dollars before that.", "The {n} saved dollars make that {v} + {n} = {r} dollars."),
    ("{S} finds {n} dollars in a {box}.", "Finding {n} dollars brings {him} to {v} + {n} = {r}."),
)
SPEND: Wordings = (
    ("{S} spends {n} dollars on a {thing}.", "The {thing} leaves {him} with {v} - {n} = {r} dollars."),
    ("{S} pays {n} dollars for a {thing}.", "After paying for the {thing}, {he} has {v} - {n} = {r} dollars."),
    ("{S} lends {n} dollars to {C}.", "{A} lends {n} dollars and keeps {v} - {n} = {r}."),
    ("{S} loses {n} dollars {place}.", "{He} loses {n}, so {v} - {n} = {r} dollars are left."),
)
TICKETS: Wordings = (
    ("{S} buys {k} {things} for {n} dollars each.", "The {things} cost {n} x {k} = {m} dollars. That leaves {v} - {m} = {r} dollars."),
    ("{S} pays {n} dollars each for {k} {things}.", "{He} pays {n} x {k} = {m} for the {things}. Then {he} has {v} - {m} = {r} dollars."),
    ("{S} gives {n} dollars to each of {k} friends.", "The friends get {n} x {k} = {m} dollars. {A} keeps {v} - {m} = {r} dollars."),
    ("{S} spends {n} dollars a day for {k} days.", "In {k} days {he} spends {n} x {k} = {m}. So {v} - {m} = {r} dollars are left."),
)
MONEY_HALF: Wordings = (
    ("{S} spends half of the money.", "{He} spends half, so {v} / 2 = {r} dollars are left."),
    ("{S} gives half of the dollars to {C}.", "{C} gets half, and {A} keeps {v} / 2 = {r} dollars."),
    ("Half of the money goes into a {box}, and {he} keeps the other half.", "The other half is {v} / 2 = {r} dollars."),
    ("{S} pays half of it for a {thing}.", "The {thing} takes half and leaves {v} / 2 = {r} dollars."),
)
MONEY_GOAL: Wordings = (
    ("A {thing} costs {g} dollars. How many more dollars does {he} need?", "For the {thing}, {he} needs {g} - {v} = {r} more dollars."),
    ("How many dollars short is {he} if a {thing} costs {g} dollars?", "{A} is {g} - {v} = {r} dollars short."),
    ("{S} wants to save {g} dollars. How much is missing?", "To save {g}, {g} - {v} = {r} dollars are missing."),
    ("How many dollars must {he} still earn to have {g}?", "{He} must still earn {g} - {v} = {r} dollars."),
)
MONEY_SHARE: Wordings = (
    ("{S} shares the money equally among {k} friends. How much does each get?", "Each of the {k} friends gets {v} / {k} = {r} dollars."),
    ("{S} splits it into {k} equal parts. How many dollars are in a part?", "One part has {v} / {k} = {r} dollars."),
    ("If all of it lasts for {k} days, how much is spent a day?", "Each day {v} / {k} = {r} dollars are spent."),
    ("The money pays for {k} {things}. How much is one {thing}?", "One {thing} is {v} / {k} = {r} dollars."),
)
MONEY_BUY: Wordings = (
    ("A {thing} costs {k} dollars. How many {things} can {he} buy?", "{He} can buy {v} / {k} = {r} {things}."),
    ("How many {things} does {he} get if each costs {k} dollars?", "At {k} dollars each, {he} gets {v} / {k} = {r} {things}."),
    ("{S} spends {k} dollars a day. For how many days does it last?", "The money lasts for {v} / {k} = {r} days."),
    ("If each friend gets {k} dollars, for how many friends is it enough?", "It is enough for {v} / {k} = {r} friends."),
)
MONEY_ASK: Wordings = (
    ("How many dollars does {he} have now?", ""),
    ("How much money does {A} have in the end?", ""),
    ("What is the number of dollars that {A} has now?", ""),
    ("Find out how many dollars {he} has at the end.", ""),
)

ALL_WORDINGS: tuple[Wordings, ...] = (
    START, START_BOXES, START_GROUPS, GAIN, LOSE, GIVE, RECALL_GAIN, RECALL_GIVE, BOXES_GAIN, DAYS_GAIN, DAYS_USE,
    HAND_OUT, DOUBLE, TIMES, HALF, THIRD, MORE, FEWER, TIMES_AS_MANY, TWICE_AS_MANY, HALF_AS_MANY, COMBINE, TOGETHER,
    DIFFERENCE, GOAL, SHARE, PACK, ASK, SELL, EARN, SPEND, TICKETS, MONEY_HALF, MONEY_GOAL, MONEY_SHARE, MONEY_BUY,
    MONEY_ASK,
)
