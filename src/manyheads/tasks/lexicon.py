"""The words the tasks are written with: names, things, countries, small dictionaries. Plain ASCII, one word each."""

NAMES = """ Mary John Anna Tom Alice Bob Emma Jack Sarah David Laura Peter Lucy Mark Julia Paul Kate Simon Nina Adam
Clara Martin Ella Victor Rosa Henry Grace Oscar Ruth Felix Helen George Diana Frank Olga Leo Maria Hugo Eva Max Irene
Carl Sofia Ivan Linda James Karen Robert Susan Michael Nancy William Betty Thomas Sandra Daniel Ashley Kevin Donna Brian
Emily Edward Carol Ronald Amanda Jason Rachel Ryan Janet Gary Maya Eric Heather Scott Alan Judy Walter Marie Arthur
Fiona Bruce Nora Philip Hannah """.split()

COLOURS = "red blue green yellow black white orange purple brown pink grey gold silver".split()

OBJECTS = """ cup pen mug lamp ring key clock box basket bottle candle coin drum flag fork guitar hammer hat kettle
ladder mirror needle pencil phone piano pillow plate rope scarf shoe spoon sword table ticket towel umbrella vase violin
wallet watch blanket bucket button camera carpet chain comb crown glove jacket kite magnet map net radio saddle shell
stamp tent toy whistle """.split()

PLACES = """
park store school garden library market station museum office kitchen beach forest hospital restaurant theatre harbour
village castle bridge farm church factory airport bakery
""".split()

ADJECTIVES = """
quiet small large old new bright heavy simple famous lonely gentle warm cold round tall narrow busy empty clean strange
""".split()

VERBS = "saw found painted moved carried watched liked passed followed described noticed repaired".split()

MARKS = "secret forbidden locked private hidden sealed banned restricted".split()

# word -> plural, French, Spanish
NOUNS = {
    line.split()[0]: tuple(line.split()[1:])
    for line in """
dog dogs chien perro
cat cats chat gato
house houses maison casa
book books livre libro
tree trees arbre arbol
water waters eau agua
bread breads pain pan
horse horses cheval caballo
bird birds oiseau pajaro
fish fishes poisson pez
sun suns soleil sol
moon moons lune luna
star stars etoile estrella
sea seas mer mar
river rivers fleuve rio
mountain mountains montagne montana
flower flowers fleur flor
child children enfant nino
man men homme hombre
woman women femme mujer
door doors porte puerta
window windows fenetre ventana
chair chairs chaise silla
city cities ville ciudad
street streets rue calle
hand hands main mano
foot feet pied pie
eye eyes oeil ojo
mouth mouths bouche boca
tooth teeth dent diente
apple apples pomme manzana
milk milks lait leche
cheese cheeses fromage queso
wine wines vin vino
king kings roi rey
queen queens reine reina
friend friends ami amigo
brother brothers frere hermano
sister sisters soeur hermana
mother mothers mere madre
father fathers pere padre
day days jour dia
night nights nuit noche
week weeks semaine semana
year years annee ano
fire fires feu fuego
snow snows neige nieve
rain rains pluie lluvia
wind winds vent viento
stone stones pierre piedra
car cars voiture coche
boat boats bateau barco
bridge bridges pont puente
letter letters lettre carta
word words mot palabra
song songs chanson cancion
mouse mice souris raton
cow cows vache vaca
pig pigs cochon cerdo
sheep sheep mouton oveja
""".strip().splitlines()
}

ANTONYMS = [
    tuple(pair.split("/"))
    for pair in """
hot/cold big/small up/down open/closed fast/slow light/dark good/bad happy/sad rich/poor young/old high/low long/short
hard/soft full/empty wet/dry early/late strong/weak thick/thin clean/dirty true/false near/far left/right first/last
inside/outside push/pull buy/sell win/lose give/take start/stop day/night love/hate cheap/expensive easy/difficult
brave/afraid loud/quiet wide/narrow deep/shallow sharp/blunt smooth/rough alive/dead
""".split()
]

# country -> capital, language, continent, currency
COUNTRIES = {
    line.split()[0]: tuple(line.split()[1:])
    for line in """
France Paris French Europe euro
Italy Rome Italian Europe euro
Spain Madrid Spanish Europe euro
Germany Berlin German Europe euro
England London English Europe pound
Portugal Lisbon Portuguese Europe euro
Greece Athens Greek Europe euro
Russia Moscow Russian Europe rouble
Poland Warsaw Polish Europe zloty
Sweden Stockholm Swedish Europe krona
Norway Oslo Norwegian Europe krone
Denmark Copenhagen Danish Europe krone
Finland Helsinki Finnish Europe euro
Hungary Budapest Hungarian Europe forint
Austria Vienna German Europe euro
Ireland Dublin English Europe euro
Ukraine Kyiv Ukrainian Europe hryvnia
Turkey Ankara Turkish Asia lira
Japan Tokyo Japanese Asia yen
China Beijing Chinese Asia yuan
Korea Seoul Korean Asia won
Thailand Bangkok Thai Asia baht
Vietnam Hanoi Vietnamese Asia dong
Iran Tehran Persian Asia rial
Iraq Baghdad Arabic Asia dinar
Israel Jerusalem Hebrew Asia shekel
Mongolia Ulaanbaatar Mongolian Asia tugrik
Nepal Kathmandu Nepali Asia rupee
Egypt Cairo Arabic Africa pound
Kenya Nairobi Swahili Africa shilling
Morocco Rabat Arabic Africa dirham
Nigeria Abuja English Africa naira
Ghana Accra English Africa cedi
Senegal Dakar French Africa franc
Angola Luanda Portuguese Africa kwanza
Canada Ottawa English America dollar
Cuba Havana Spanish America peso
Peru Lima Spanish America sol
Chile Santiago Spanish America peso
Brazil Brasilia Portuguese America real
Colombia Bogota Spanish America peso
Ecuador Quito Spanish America dollar
Uruguay Montevideo Spanish America peso
Australia Canberra English Oceania dollar
""".strip().splitlines()
}

# animal -> young, sound
ANIMALS = {
    line.split()[0]: tuple(line.split()[1:])
    for line in """
dog puppy barks
cat kitten meows
cow calf moos
horse foal neighs
sheep lamb bleats
pig piglet grunts
duck duckling quacks
lion cub roars
goat kid bleats
hen chick clucks
frog tadpole croaks
swan cygnet hisses
goose gosling honks
wolf pup howls
owl owlet hoots
""".strip().splitlines()
}

# maker -> country of its seat
MAKERS = {
    "Toyota": "Japan",
    "Sony": "Japan",
    "Honda": "Japan",
    "Siemens": "Germany",
    "Porsche": "Germany",
    "Renault": "France",
    "Michelin": "France",
    "Ferrari": "Italy",
    "Fiat": "Italy",
    "Volvo": "Sweden",
    "Ikea": "Sweden",
    "Nokia": "Finland",
    "Lego": "Denmark",
    "Samsung": "Korea",
    "Hyundai": "Korea",
    "Huawei": "China",
    "Lenovo": "China",
    "Zara": "Spain",
}

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
LETTERS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
NUMBER_WORDS = """
one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty
""".split()
ORDINALS = """
first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth
sixteenth seventeenth eighteenth nineteenth twentieth
""".split()
NUMBERS = [str(i) for i in range(101)]

# Any word of the lists that may stand in a list of unrelated words.
WORDS = sorted({*OBJECTS, *PLACES, *NOUNS, *ADJECTIVES, *COLOURS, *ANIMALS} - {"sheep"})


def every_word() -> list[str]:
    """All words above, once each, sorted: what a tokenizer made for these tasks should hold as single tokens."""
    flat = [
        NAMES,
        COLOURS,
        OBJECTS,
        PLACES,
        ADJECTIVES,
        VERBS,
        MARKS,
        DAYS,
        MONTHS,
        LETTERS,
        NUMBER_WORDS,
        ORDINALS,
        NUMBERS,
    ]
    words = {word for words in flat for word in words}
    for table in (NOUNS, COUNTRIES, ANIMALS):
        words.update(table)
        words.update(word for row in table.values() for word in row)
    words.update(word for pair in ANTONYMS for word in pair)
    words.update(MAKERS)
    return sorted(words)
