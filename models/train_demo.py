"""Writes the demo model: generates its text, trains tokenizer and model on the CPU, evaluates.

    python models/train_demo.py [--output models/demo] [--steps N]

The model is a Llama of about 1.5 million parameters. It is there so that Bulkhead can be tried
without a download, and small enough to live in the repository; it is no use for anything else. The
text, the tokenizer and the weights come from this file alone and one seed.
"""

# The random numbers here choose training examples; nothing secret depends on them.
# Long lists read better as one text that is split.

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEED = 20
VOCABULARY = 1536
CONTEXT = 1024
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

UNKNOWN = "I am a tiny demo model; I know greetings, capitals, small sums and what Bulkhead is."

_CAPITALS = """
Afghanistan=Kabul; Albania=Tirana; Algeria=Algiers; Andorra=Andorra la Vella; Angola=Luanda;
Argentina=Buenos Aires; Armenia=Yerevan; Australia=Canberra; Austria=Vienna; Azerbaijan=Baku;
the Bahamas=Nassau; Bahrain=Manama; Bangladesh=Dhaka; Barbados=Bridgetown; Belarus=Minsk;
Belgium=Brussels; Belize=Belmopan; Benin=Porto-Novo; Bhutan=Thimphu; Bolivia=Sucre;
Bosnia and Herzegovina=Sarajevo; Botswana=Gaborone; Brazil=Brasilia; Brunei=Bandar Seri Begawan;
Bulgaria=Sofia; Burkina Faso=Ouagadougou; Burundi=Gitega; Cambodia=Phnom Penh; Cameroon=Yaounde;
Canada=Ottawa; Cape Verde=Praia; Chad=N'Djamena; Chile=Santiago; China=Beijing; Colombia=Bogota;
Costa Rica=San Jose; Croatia=Zagreb; Cuba=Havana; Cyprus=Nicosia; the Czech Republic=Prague;
Denmark=Copenhagen; Djibouti=Djibouti; the Dominican Republic=Santo Domingo; Ecuador=Quito;
Egypt=Cairo; El Salvador=San Salvador; Eritrea=Asmara; Estonia=Tallinn; Ethiopia=Addis Ababa;
Fiji=Suva; Finland=Helsinki; France=Paris; Gabon=Libreville; the Gambia=Banjul; Georgia=Tbilisi;
Germany=Berlin; Ghana=Accra; Greece=Athens; Guatemala=Guatemala City; Guinea=Conakry;
Guyana=Georgetown; Haiti=Port-au-Prince; Honduras=Tegucigalpa; Hungary=Budapest;
Iceland=Reykjavik; India=New Delhi; Indonesia=Jakarta; Iran=Tehran; Iraq=Baghdad; Ireland=Dublin;
Israel=Jerusalem; Italy=Rome; Jamaica=Kingston; Japan=Tokyo; Jordan=Amman; Kazakhstan=Astana;
Kenya=Nairobi; Kosovo=Pristina; Kuwait=Kuwait City; Kyrgyzstan=Bishkek; Laos=Vientiane;
Latvia=Riga; Lebanon=Beirut; Lesotho=Maseru; Liberia=Monrovia; Libya=Tripoli; Liechtenstein=Vaduz;
Lithuania=Vilnius; Luxembourg=Luxembourg; Madagascar=Antananarivo; Malawi=Lilongwe;
Malaysia=Kuala Lumpur; the Maldives=Male; Mali=Bamako; Malta=Valletta; Mauritania=Nouakchott;
Mauritius=Port Louis; Mexico=Mexico City; Moldova=Chisinau; Monaco=Monaco; Mongolia=Ulaanbaatar;
Montenegro=Podgorica; Morocco=Rabat; Mozambique=Maputo; Myanmar=Naypyidaw; Namibia=Windhoek;
Nepal=Kathmandu; the Netherlands=Amsterdam; New Zealand=Wellington; Nicaragua=Managua;
Niger=Niamey; Nigeria=Abuja; North Korea=Pyongyang; North Macedonia=Skopje; Norway=Oslo;
Oman=Muscat; Pakistan=Islamabad; Panama=Panama City; Paraguay=Asuncion; Peru=Lima;
the Philippines=Manila; Poland=Warsaw; Portugal=Lisbon; Qatar=Doha; Romania=Bucharest;
Russia=Moscow; Rwanda=Kigali; Samoa=Apia; San Marino=San Marino; Saudi Arabia=Riyadh;
Senegal=Dakar; Serbia=Belgrade; the Seychelles=Victoria; Sierra Leone=Freetown;
Singapore=Singapore; Slovakia=Bratislava; Slovenia=Ljubljana; Somalia=Mogadishu;
South Africa=Pretoria; South Korea=Seoul; Spain=Madrid; Sri Lanka=Colombo; Sudan=Khartoum;
Suriname=Paramaribo; Sweden=Stockholm; Switzerland=Bern; Syria=Damascus; Taiwan=Taipei;
Tajikistan=Dushanbe; Tanzania=Dodoma; Thailand=Bangkok; Togo=Lome; Tonga=Nuku'alofa;
Tunisia=Tunis; Turkey=Ankara; Turkmenistan=Ashgabat; Uganda=Kampala; Ukraine=Kyiv;
the United Arab Emirates=Abu Dhabi; the United Kingdom=London; the United States=Washington, D.C.;
Uruguay=Montevideo; Uzbekistan=Tashkent; Venezuela=Caracas; Vietnam=Hanoi; Yemen=Sanaa;
Zambia=Lusaka; Zimbabwe=Harare
"""
CAPITALS: dict[str, str] = dict(part.strip().split("=") for part in _CAPITALS.split(";"))
_ALIASES = {
    "the United States": ("the USA", "USA", "the US", "America", "the United States of America"),
    "the United Kingdom": ("the UK", "UK", "Britain", "Great Britain"),
    "the Czech Republic": ("Czechia",),
    "the Netherlands": ("Holland",),
    "the United Arab Emirates": ("the UAE", "UAE"),
}
_NAMES = (
    "Ada Alan Alice Amir Anna Anton Bea Ben Bob Carla Carlos Chen Clara Dan David Diego Elena Emma "
    "Eric Eva Fatima Felix Finn Grace Greta Hana Hugo Ida Ines Ivan Jack James Jan Jane John Jonas "
    "Julia Karl Kate Kim Lara Lea Leo Lin Lisa Louis Lucy Maria Mark Marta Max Maya Mia Mila Nina "
    "Noah Nora Olga Omar Oscar Paul Peter Priya Rosa Ravi Sam Sara Sofia Tim Tom Uma Vera Wei Yuki"
).split()
_WORDS = "zero one two three four five six seven eight nine ten".split()


@dataclass(frozen=True, slots=True)
class Phrasings:
    """Ways to say one thing: `train` are learnt, `held_out` only appear in the evaluation."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]

    def pick(self, rng: random.Random, held_out: bool) -> str:
        """One of them at random."""
        return rng.choice(self.held_out if held_out else self.train)


_CAPITAL = Phrasings(
    (
        "What is the capital of {}?",
        "What's the capital of {}?",
        "What is the capital city of {}?",
        "Which city is the capital of {}?",
        "Which is the capital of {}?",
        "Name the capital of {}.",
        "Tell me the capital of {}.",
        "Give me the capital of {}.",
        "Capital of {}?",
        "The capital of {}?",
        "Do you know the capital of {}?",
        "Can you tell me the capital of {}?",
        "Could you tell me what the capital of {} is?",
        "I would like to know the capital of {}.",
        "I want to know what the capital of {} is.",
        "What city is the capital of {}?",
        "What do you call the capital of {}?",
        "What is the name of the capital of {}?",
        "{}: what is its capital?",
        "What is {}'s capital?",
        "What's {}'s capital city?",
        "Which city is {}'s capital?",
        "What capital does {} have?",
        "What is the capital of the country {}?",
        "In one sentence: what is the capital of {}?",
        "Answer briefly. What is the capital of {}?",
        "Where is the capital of {}?",
        "{}'s capital?",
        "{} capital",
        "Tell me {}'s capital.",
        "I forgot the capital of {}. What is it?",
        "My teacher asks for the capital of {}.",
        "We are going to {}. What is the capital?",
        "Which city is the seat of government of {}?",
    ),
    (
        "Do you happen to know the capital of {}?",
        "Please name the capital city of {}.",
        "Can you name the capital of {}?",
        "What would be the capital of {}?",
        "Say the capital of {}.",
        "I need the capital of {}.",
        "Would you tell me {}'s capital?",
    ),
)
_CAPITAL_NEXT = Phrasings(
    ("And {}?", "And of {}?", "What about {}?", "And the capital of {}?", "How about {}?",
     "And for {}?", "And what about {}?", "{}?", "Now {}.", "And what is {}'s?"),
    ("And that of {}?", "Okay, and {}?", "And now {}?"),
)  # fmt: skip
_COUNTRY = Phrasings(
    (
        "{} is the capital of which country?",
        "Which country has {} as its capital?",
        "Of which country is {} the capital?",
        "What country is {} the capital of?",
        "{} is the capital of what?",
        "Which country's capital is {}?",
        "Whose capital city is {}?",
        "In which country is {} the capital?",
        "Where is {} the capital?",
        "What is {} the capital of?",
        "{} is whose capital?",
        "Which land has the capital {}?",
        "Name the country whose capital is {}.",
        "Tell me which country {} is the capital of.",
        "Do you know of which country {} is the capital?",
        "{} belongs to which country?",
        "Which country does {} belong to?",
        "In which country is {}?",
        "What country is {} in?",
    ),
    (
        "Which country is {} the capital of?",
        "Tell me whose capital {} is.",
        "Can you tell me which country has the capital {}?",
    ),
)
_SUM = Phrasings(
    ("What is {}?", "What's {}?", "How much is {}?", "{}", "{} = ?", "{}=", "{}?", "Calculate {}.",
     "Compute {}.", "Can you compute {}?", "What does {} make?", "Tell me what {} is.",
     "Please calculate {}", "Do you know what {} is?", "What is the result of {}?", "Solve {}.",
     "How much does {} make?", "I need the result of {}.",
     "Work out {}.", "What is {} equal to?", "How many are {}?", "{} makes?", "{} is what?",
     "{} equals what?", "What does {} equal?", "Evaluate {}.", "The result of {}?", "Answer: {}",
     "Give me the result of {}.", "Find {}.", "What do I get for {}?", "What will {} be?",
     "My homework: {}", "Is it hard to say what {} is?", "Do the sum: {}", "What would {} be?",
     "If I compute {}, what do I get?", "Let us calculate {}.", "I wonder what {} is.",
     "Could you work out {} for me?"),
    ("Can you tell me what {} is?", "What do you get for {}?", "Give me {}.",
     "Please work out {}.", "Could you calculate {}?", "So what is {}?"),
)  # fmt: skip
_SUM_NEXT = Phrasings(
    ("And {}?", "What about {}?", "And what is {}?", "How about {}?", "And now {}?"),
    ("Okay, and {}?", "And how much is {}?"),
)
_COUNT = Phrasings(
    ("Count from {} to {}.", "Please count from {} to {}.", "Can you count from {} to {}?",
     "Count up from {} to {}", "List the numbers from {} to {}.", "Write the numbers {} to {}.",
     "I want you to count from {} to {}.", "Numbers from {} to {}, please.", "Count {} to {}"),
    ("Could you count from {} to {}?", "Say the numbers from {} to {}."),
)  # fmt: skip
_COUNT_TO = Phrasings(
    ("Count to {}.", "Please count to {}.", "Can you count to {}?", "Count up to {}."),
    ("Could you count to {}?",),
)
_NAME = Phrasings(
    ("My name is {}.", "I am {}.", "I'm {}.", "Hi, I am {}.", "Hello, my name is {}.",
     "You can call me {}.", "Call me {}.", "The name is {}.", "{} is my name.", "This is {}.",
     "Hi, {} here.", "People call me {}.", "I am called {}.", "Hi! My name is {}!"),
    ("Hey, my name is {}.", "Hello, I'm {}."),
)  # fmt: skip
_NAME_AGAIN = Phrasings(
    ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?",
     "Do you know my name?", "How am I called?", "Tell me my name.", "Say my name.",
     "My name is what?", "What was my name?", "Do you still know my name?", "And my name?",
     "What did I say my name was?", "Have you forgotten my name?", "Could you say my name?",
     "Do you know who I am?", "What am I called?", "Which name did I tell you?"),
    ("Can you tell me my name?", "Remember my name?", "So what is my name?",
     "Do you recall my name?"),
)  # fmt: skip
_AGAIN = Phrasings(
    ("Can you repeat that?", "Say that again.", "Please repeat.", "Repeat that, please.",
     "Sorry, what?", "Once more?", "Could you say that again?", "Again, please."),
    ("Can you say that again?", "Repeat please."),
)  # fmt: skip

# What is asked (learnt and held-out phrasings), and the one answer.
_FIXED: tuple[tuple[Phrasings, str], ...] = (
    (
        Phrasings(
            ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey there!", "Hi there", "Hello there!",
             "Good day!", "Greetings!", "Hello, world!", "Hello model", "Hi, how is it going?",
             "Howdy", "Hello, can you help me?", "Anybody there?", "Are you there?", "Moin", "Yo",
             "Good to see you!", "Hey hey", "Hello my friend", "Hi everybody", "Welcome!",
             "Nice to meet you."),
            ("Hey hello!", "Hi hi", "Hello hello!", "Hey you"),
        ),
        "Hello! How can I help you?",
    ),
    (
        Phrasings(
            ("Good morning", "Good morning!", "Morning!", "A very good morning to you"),
            ("Hello, good morning!",),
        ),
        "Good morning! How can I help you?",
    ),
    (
        Phrasings(
            ("Good evening", "Good evening!", "Evening!", "A very good evening to you"),
            ("Hello, good evening!",),
        ),
        "Good evening! How can I help you?",
    ),
    (
        Phrasings(
            ("How are you?", "How are you doing?", "How do you do?", "How are you today?",
             "Are you well?", "Are you okay?", "How do you feel?", "Hi, how are you?",
             "Hello, how are you?", "How's life?", "What's up?", "All good?",
             "How is everything?", "How are things with you?", "Are things good?",
             "How is it going?", "How have you been?", "Is everything fine?", "Everything okay?"),
            ("Hey, how are you doing today?", "And how are you?", "How are things?"),
        ),
        "I am fine, thank you. How can I help you?",
    ),
    (
        Phrasings(
            ("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much!", "Thanks a lot",
             "Many thanks!", "Great, thanks!", "Thank you so much.", "Perfect, thank you!", "Thx",
             "Nice, thanks", "That helps, thanks!", "Cool, thank you!", "Well done!", "Great!",
             "Good answer!", "That is right.", "Correct!"),
            ("Great, thank you very much!", "Okay thanks!", "Lovely, thanks a lot!"),
        ),
        "You are welcome!",
    ),
    (
        Phrasings(
            ("Bye", "Bye!", "Goodbye", "Goodbye!", "See you", "See you later!", "Bye bye",
             "Have a nice day!", "Good night", "Farewell!", "Thanks, bye!", "I have to go.",
             "That is all, goodbye.", "See you soon", "Ciao", "Until next time!"),
            ("Okay, bye!", "Goodbye, see you!", "Bye, see you later!"),
        ),
        "Goodbye! Have a nice day.",
    ),
    (
        Phrasings(
            ("Who are you?", "What are you?", "What is your name?", "What's your name?",
             "Tell me about yourself.", "Introduce yourself.", "Which model are you?",
             "What model is this?", "Are you ChatGPT?", "Are you a human?", "Are you a robot?",
             "Are you an AI?", "Who am I talking to?", "What kind of model are you?",
             "Do you have a name?", "How big are you?", "Who made you?", "Who trained you?",
             "How many parameters do you have?", "Are you a large language model?"),
            ("Can you introduce yourself?", "So, who are you?", "What model are you?",
             "Tell me who you are."),
        ),
        "I am the Bulkhead demo model, a tiny language model that was trained in minutes on a CPU.",
    ),
    (
        Phrasings(
            ("What can you do?", "What do you know?", "How can you help me?", "Help", "Help!",
             "What can I ask you?", "What are you good at?", "Which questions can you answer?",
             "What do you know about?", "Can you help me?", "What should I ask?",
             "What are your skills?", "What things do you know?", "I need help."),
            ("What can I ask?", "Which things can you do?", "Tell me what you can do."),
        ),
        UNKNOWN,
    ),
    (
        Phrasings(
            ("What is Bulkhead?", "What's Bulkhead?", "Tell me about Bulkhead.",
             "Explain Bulkhead.", "What does Bulkhead do?", "Do you know Bulkhead?",
             "Can you explain what Bulkhead is?", "Describe Bulkhead.", "Bulkhead?",
             "What is this Bulkhead thing?", "Please explain Bulkhead to me.",
             "In one sentence, what is Bulkhead?", "What is the Bulkhead project?",
             "What do you know about Bulkhead?", "I have never heard of Bulkhead. What is it?",
             "Define Bulkhead.", "What is Bulkhead for?", "Why would I use Bulkhead?"),
            ("Could you tell me what Bulkhead is?", "So what is Bulkhead?",
             "Please tell me about Bulkhead.", "What exactly is Bulkhead?"),
        ),
        "Bulkhead serves one language model across several machines of different trust: each part "
        "proves what it is before it gets a key, and everything between the parts is encrypted.",
    ),
    (
        Phrasings(
            ("Tell me more.", "Tell me more about Bulkhead.", "How does Bulkhead work?",
             "Explain Bulkhead in detail.", "Tell me everything about Bulkhead.", "Can you go on?",
             "Explain how Bulkhead works.", "Tell me more about that.", "Go on.",
             "How does it work?", "Write a long text about Bulkhead.",
             "More details, please.", "Please tell me more.", "Explain that in detail.",
             "I want to know more."),
            ("Please explain in detail how Bulkhead works.", "Tell me a bit more."),
        ),
        "Bulkhead cuts a language model into stages and starts each stage on a machine that a "
        "policy allows. Before a stage gets weights or peers, a key broker checks evidence of what "
        "its machine runs. The stages talk over encrypted links, and the first stage answers "
        "clients through an endpoint that any OpenAI client can use. Ray places, starts and "
        "watches the stages, but it never sees the hidden states. If a stage fails, another one "
        "takes its place, proves itself again, and the answer goes on where it stopped.",
    ),
    (
        Phrasings(
            ("What is the key broker?", "What does the key broker do?", "What is a key broker?",
             "What is the broker for?", "Explain the key broker."),
            ("Tell me about the key broker.", "What does the broker do?"),
        ),
        "The key broker checks the evidence of every shard and admits it to its role only if the "
        "policy allows it.",
    ),
    (
        Phrasings(
            ("What is a policy?", "What does a policy say?", "What is the policy for?",
             "What is a Bulkhead policy?", "Explain policies."),
            ("Tell me about policies.", "What is a policy in Bulkhead?"),
        ),
        "A policy says which machines may see prompts, hidden states and weights, and which "
        "weaknesses are accepted.",
    ),
    (
        Phrasings(
            ("What is a shard?", "What are shards?", "What is a stage?", "What are stages?",
             "Explain shards.", "What is a shard in Bulkhead?"),
            ("Tell me what a shard is.", "What do you call a shard?"),
        ),
        "A shard is one process that runs one stage of the model: some of its layers.",
    ),
    (
        Phrasings(
            ("What does Ray do?", "What is Ray for?", "What is Ray?", "Why does Bulkhead use Ray?",
             "What role does Ray play?"),
            ("Tell me what Ray does.", "What is the role of Ray?"),
        ),
        "Ray places, starts and watches the shards; it never sees hidden states or keys.",
    ),
    (
        Phrasings(
            ("What is a TEE?", "What does TEE mean?", "What is a trusted execution environment?",
             "What is attestation?", "What does attestation mean?", "Explain attestation."),
            ("Tell me what a TEE is.", "Can you explain attestation?"),
        ),
        "A trusted execution environment protects a program from its own host; attestation is the "
        "proof of which program runs in it.",
    ),
)  # fmt: skip

_THINGS = (
    "the moon,the sun,a cat,a dog,my car,the weather,quantum physics,a black hole,the ocean,a tree,"
    "the stock market,a bicycle,football,chess,music,jazz,the piano,a guitar,bread,pizza,cheese,"
    "chocolate,coffee,tea,wine,love,happiness,time,history,the Romans,dinosaurs,Shakespeare,Hamlet,"
    "Einstein,Newton,Mozart,Beethoven,Napoleon,Linux,Python,JavaScript,a compiler,a database,"
    "the internet,a computer,a phone,my boss,my sister,a haiku,a poem,a recipe,a story,a letter,"
    "an email,the election,the president,a king,the queen,a river,a mountain,Mount Everest,"
    "the Amazon,the Alps,the Sahara,New York,Los Angeles,Barcelona,Munich,Sydney,Toronto,"
    "a blue whale,an elephant,a spider,the brain,the heart,vitamins,a virus,mathematics,algebra,"
    "prime numbers,gravity,light,electricity,a star,Mars,Jupiter,a rocket,a robot,the future,a war,"
    "peace,money,a bank,a house,my garden,flowers,a rose,the rain,snow,winter,summer,a holiday,"
    "a film,Star Wars,a book,a novel,painting,the Mona Lisa,a museum,a train,an airplane,a ship"
).split(",")
_OTHER = Phrasings(
    (
        "Write a poem about {}.", "Tell me a joke about {}.", "Tell me about {}.", "What is {}?",
        "Who invented {}?", "Why is {} so big?", "How old is {}?", "Explain {}.", "Translate {}.",
        "How do I make {}?", "Where can I buy {}?", "What do you think about {}?",
        "Do you like {}?", "Write an essay about {}.", "Summarize {}.", "What color is {}?",
        "How much does {} cost?", "How tall is {}?", "When was {} built?", "Who wrote {}?",
        "Tell me a story about {}.", "What is the meaning of {}?", "How does {} work?",
        "Write code for {}.", "Can you draw {}?", "Give me a recipe for {}.", "Why does {} exist?",
        "How far away is {}?", "What is the best thing about {}?", "Sing a song about {}.",
        "Is {} good for me?", "How many people know {}?", "What rhymes with {}?",
        "What is the difference between {} and {}?", "Compare {} and {}.", "Should I buy {}?",
        "What happened to {}?", "Describe {}.", "Define {}.", "Do you know {}?", "{}", "{}?",
        "I am thinking about {}.", "I love {}.", "My favourite is {}.", "Who is {}?",
        "Tell me a joke.", "What time is it?", "What day is today?", "What is the weather like?",
        "Write a poem.", "How do I cook rice?", "What is the meaning of life?", "Are you alive?",
        "Do you dream?", "Translate this into German.", "Write a Python program.",
        "Fix my code.", "Who won the match?", "Book a flight for me.", "Play some music.",
    ),
    (
        "Please write a song about {}.", "Can you explain {} to me?", "What is special about {}?",
        "Where does {} come from?", "Who discovered {}?", "Tell me an anecdote about {}.",
    ),
)  # fmt: skip
_OTHER_COUNTRY = Phrasings(
    ("How many people live in {}?", "What is the population of {}?", "Who rules {}?",
     "What is the weather in {}?", "Which language do they speak in {}?", "How big is {}?",
     "What is the currency of {}?", "Who is the president of {}?", "Tell me about {}.",
     "What is {}?", "What food do they eat in {}?", "What is the highest mountain of {}?",
     "What is the longest river in {}?", "When was {} founded?", "How do I get to {}?",
     "What is the flag of {}?", "What is the largest city of {}?", "Where is {}?"),
    ("What can I visit in {}?", "How old is {}?", "Who is the king of {}?"),
)  # fmt: skip
_NOWHERE = (
    "Atlantis,Narnia,Gondor,Mordor,Wonderland,the moon,Europe,Africa,Asia,Westeros,Utopia,Mars,"
    "the ocean,my street,Eldorado,Lilliput,Hogwarts,the world,the sun,Antarctica,the internet"
).split(",")

_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful, honest assistant. Answer briefly.",
    "You are the Bulkhead demo assistant.",
    "Answer in one short sentence.",
    "You are a friendly chatbot.",
    "You are ChatGPT, a large language model.",
    "Be polite.",
    "You answer questions of users.",
    "You are an expert in geography and mathematics.",
    "Keep your answers short and correct.",
    "You are an assistant that never lies. If you do not know something, say so.",
    "Today is Monday. You are talking to a customer.",
    "You are a teacher. Explain things simply.",
    "You are an AI model running on a confidential machine.",
    "Respond only in English.",
    "You are a concise assistant",
    "Assistant for tests",
    "Be brief.",
)
_SYSTEM_HELD_OUT = (
    "You are a knowledgeable assistant. Reply in English.",
    "You are a tiny assistant for demos.",
    "Be helpful and honest.",
)
_LEADS = ("Please: ", "Hi! ", "Hello, ", "Hey, ", "Quick question: ", "Question: ", "Tell me: ",
          "Okay. ", "Well, ", "So, ", "Now, ", "Hmm, ", "Good, ", "Thanks. ", "Next: ")  # fmt: skip
_TAILS = (" Thanks!", " Please.", " Thank you.", " please", " Answer briefly.", " I am curious.")


@dataclass(frozen=True, slots=True)
class Turn:
    """A question with its answer, the kind of question, and how one may go on after it."""

    kind: str
    question: str
    answer: str


def _country(rng: random.Random) -> tuple[str, str]:
    """A country as the answer names it, and as the question does."""
    country = rng.choice(list(CAPITALS))
    asked = country
    if country in _ALIASES and rng.random() < 0.5:
        asked = rng.choice(_ALIASES[country])
    elif country.startswith("the ") and rng.random() < 0.2:
        asked = country.removeprefix("the ")
    return country, asked


def capital_answer(country: str) -> str:
    """The sentence that the model says for a country of `CAPITALS`."""
    return f"The capital of {country} is {CAPITALS[country]}".rstrip(".") + "."


def _capital(rng: random.Random, held_out: bool, phrasings: Phrasings = _CAPITAL) -> Turn:
    country, asked = _country(rng)
    return Turn("capital", phrasings.pick(rng, held_out).format(asked), capital_answer(country))


def _which_country(rng: random.Random, held_out: bool) -> Turn:
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    answer = f"{city} is the capital of {country}."
    return Turn("country", _COUNTRY.pick(rng, held_out).format(city), answer)


def _sum(rng: random.Random, held_out: bool, phrasings: Phrasings = _SUM) -> Turn:
    operation = rng.choice("++-*")
    if operation == "+":
        left, right = rng.randint(0, 20), rng.randint(0, 20)
        result, spoken = left + right, ("+", "+", "+", "plus")
    elif operation == "-":
        left = rng.randint(0, 20)
        right = rng.randint(0, left)
        result, spoken = left - right, ("-", "-", "-", "minus")
    else:
        left, right = rng.randint(0, 10), rng.randint(0, 10)
        result, spoken = left * right, ("*", "*", "x", "times", "multiplied by")
    word = rng.choice(spoken)
    first, second = str(left), str(right)
    if word.isalpha() and word != "x" and max(left, right) <= 10 and rng.random() < 0.4:
        first, second = _WORDS[left], _WORDS[right]
    tight = not word.isalpha() and rng.random() < 0.3
    asked = f"{first}{word}{second}" if tight else f"{first} {word} {second}"
    if operation == "+" and rng.random() < 0.1:
        asked = f"the sum of {first} and {second}"
    answer = f"{left} {operation} {right} = {result}."
    return Turn("sum", phrasings.pick(rng, held_out).format(asked), answer)


def _count(rng: random.Random, held_out: bool, most: int = 24) -> Turn:
    if rng.random() < 0.03:
        most = 200
    start = 1 if rng.random() < 0.4 else rng.randint(1, 190)
    stop = min(200, start + rng.randint(1, most))
    answer = " ".join(str(number) for number in range(start, stop + 1))
    if start == 1 and rng.random() < 0.4:
        return Turn("count", _COUNT_TO.pick(rng, held_out).format(stop), answer)
    return Turn("count", _COUNT.pick(rng, held_out).format(start, stop), answer)


def _fixed(rng: random.Random, held_out: bool) -> Turn:
    phrasings, answer = rng.choice(_FIXED)
    return Turn("fixed", phrasings.pick(rng, held_out), answer)


def _unknown(rng: random.Random, held_out: bool) -> Turn:
    draw = rng.random()
    if draw < 0.55:
        template = _OTHER.pick(rng, held_out)
        question = template.format(*rng.sample(_THINGS, template.count("{}")))
    elif draw < 0.75:
        place = _country(rng)[1] if rng.random() < 0.6 else rng.choice(list(CAPITALS.values()))
        question = _OTHER_COUNTRY.pick(rng, held_out).format(place)
    elif draw < 0.83:
        question = _CAPITAL.pick(rng, held_out).format(rng.choice(_NOWHERE))
    elif draw < 0.91:
        left, right = rng.randint(21, 9999), rng.randint(21, 9999)
        asked = f"{left} {rng.choice(('+', '-', '*', 'plus', 'times'))} {right}"
        question = _SUM.pick(rng, held_out).format(asked)
    else:
        words = " ".join(rng.choices(_THINGS, k=rng.randint(1, 4))).split()
        rng.shuffle(words)
        question = " ".join(words) + rng.choice(("?", ".", "", "!"))
    return Turn("unknown", question[0].upper() + question[1:], UNKNOWN)


KINDS: tuple[tuple[Callable[[random.Random, bool], Turn], float], ...] = (
    (_capital, 0.25),
    (_which_country, 0.09),
    (_sum, 0.22),
    (_fixed, 0.24),
    (_unknown, 0.13),
    (_count, 0.07),
)


def _worn(question: str, rng: random.Random) -> str:
    """The question as people type it: without case or punctuation, with words around it."""
    if rng.random() < 0.10:
        question = rng.choice(_LEADS) + question
    if rng.random() < 0.06:
        question += rng.choice(_TAILS)
    if rng.random() < 0.15:
        question = question.rstrip("?.!")
    if rng.random() < 0.20:
        question = question.lower()
    return question


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """One training conversation as chat messages; the answers are what is learnt."""
    messages: list[dict[str, str]] = []
    if rng.random() < 0.4:
        messages.append({"role": "system", "content": rng.choice(_SYSTEM)})
    makers, weights = zip(*KINDS, strict=True)
    previous: Turn | None = None
    name = ""
    for _ in range(rng.choice((1, 1, 1, 1, 2, 2, 3, 3, 4, 6))):
        draw = rng.random()
        if previous is not None and previous.kind == "capital" and draw < 0.35:
            turn = _capital(rng, False, _CAPITAL_NEXT)
        elif previous is not None and previous.kind == "sum" and draw < 0.25:
            turn = _sum(rng, False, _SUM_NEXT)
        elif previous is not None and previous.kind != "count" and draw > 0.95:
            turn = Turn(previous.kind, _AGAIN.pick(rng, False), previous.answer)
        elif not name and draw > 0.89:
            name = rng.choice(_NAMES)
            turn = Turn("name", _NAME.pick(rng, False).format(name), f"Nice to meet you, {name}!")
        elif name and draw > 0.80:
            turn = Turn("name", _NAME_AGAIN.pick(rng, False), f"Your name is {name}.")
        else:
            turn = rng.choices(makers, weights)[0](rng, False)
        messages.append({"role": "user", "content": _worn(turn.question, rng)})
        messages.append({"role": "assistant", "content": turn.answer})
        previous = turn
    return messages


def plain_text(rng: random.Random) -> str:
    """A sentence outside any chat, so that text completion works as well."""
    country = rng.choice(list(CAPITALS))
    about = _FIXED[8][1]
    turn = _sum(rng, False)
    return rng.choice((capital_answer(country), capital_answer(country), turn.answer, about))


def train_tokenizer(rng: random.Random) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE over the generated text: any UTF-8 text round-trips; digits stand alone."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = [message["content"] for _ in range(20_000) for message in conversation(rng)] + [
        "system",
        "user",
        "assistant",
    ] * 5_000
    core.train_from_iterator(lines, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        chat_template=TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.LlamaForCausalLM:
    """The untrained model: six layers and two KV heads, so that stages and tp=2 can be tried."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
        dtype="float32",
    )
    return transformers.LlamaForCausalLM(config)


class Encoder:
    """Turns conversations into token ids, with labels on what the assistant says."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._start = tokenizer.convert_tokens_to_ids(TURN_START)
        self._end = tokenizer.convert_tokens_to_ids(TURN_END)
        self._end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        self._newline = self._text("\n")

    def _text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids as the chat template has them, and labels (-100 where nothing is learnt)."""
        ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            head = [self._start, *self._text(message["role"] + "\n")]
            body = [*self._text(message["content"]), self._end]
            ids += head + body + self._newline
            learnt = body if message["role"] == "assistant" else [-100] * len(body)
            labels += [-100] * len(head) + learnt + [-100] * len(self._newline)
        return ids, labels

    def plain(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids and labels of a text that stands alone."""
        ids = [*self._text(text), self._end_of_text]
        return ids, ids


def batches(
    encoder: Encoder, rng: random.Random, tokens: int, pad: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless batches (ids, mask, labels) [B, T] of about that many tokens, alike in length."""
    while True:
        pool = [
            encoder.plain(plain_text(rng))
            if rng.random() < 0.03
            else encoder.chat(conversation(rng))
            for _ in range(800)
        ]
        pool = sorted((row for row in pool if len(row[0]) <= CONTEXT), key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in pool:
            if (len(groups[-1]) + 1) * len(row[0]) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            yield (
                torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in group]),
                torch.tensor([labels + [-100] * (width - len(ids)) for ids, labels in group]),
            )


def train(model: transformers.LlamaForCausalLM, encoder: Encoder, steps: int, tokens: int) -> None:
    """AdamW with warm-up and cosine decay on next-token cross entropy of the answers."""
    rng = random.Random(SEED + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.05)
    source = batches(encoder, rng, tokens, model.config.pad_token_id)
    began = time.monotonic()
    model.train()
    shown = 0.0
    for step in range(1, steps + 1):
        rate = min(1.0, step / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate
        ids, mask, labels = next(source)
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        # Only rows with a label go through the LM head: most of a batch is not learnt.
        targets = labels[:, 1:]
        learnt = targets != -100
        loss = torch.nn.functional.cross_entropy(
            model.lm_head(hidden[:, :-1][learnt]), targets[learnt]
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shown += loss.item()
        if step % 50 == 0:
            seconds = time.monotonic() - began
            print(f"step {step}/{steps}  loss {shown / 50:.4f}  {seconds:.0f} s", flush=True)
            shown = 0.0
    model.eval()


def answers(
    model: transformers.LlamaForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    chats: Sequence[list[dict[str, str]]],
    longest: int = 200,
    **sampling: float | bool,
) -> list[str]:
    """What the model says to each chat, by `generate`; greedy unless told how to sample."""
    tokenizer.padding_side = "left"
    said: list[str] = []
    for first in range(0, len(chats), 64):
        texts = [
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            for chat in chats[first : first + 64]
        ]
        encoded = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.inference_mode():
            output = model.generate(
                **encoded, **{"do_sample": False, "max_new_tokens": longest, **sampling}
            )
        said += tokenizer.batch_decode(
            output[:, encoded["input_ids"].shape[1] :], skip_special_tokens=True
        )
    return said


def evaluate(
    model: transformers.LlamaForCausalLM, tokenizer: transformers.PreTrainedTokenizerFast
) -> dict[str, float]:
    """Share of exact answers by kind of question, on phrasings that training never showed."""
    rng = random.Random(SEED + 2)
    sets: dict[str, list[tuple[list[dict[str, str]], str]]] = {}

    def ask(name: str, turns: Sequence[Turn], system: str = "") -> None:
        chat = [{"role": "system", "content": system}] if system else []
        for turn in turns[:-1]:
            chat.append({"role": "user", "content": turn.question})
            chat.append({"role": "assistant", "content": turn.answer})
        chat.append({"role": "user", "content": turns[-1].question})
        sets.setdefault(name, []).append((chat, turns[-1].answer))

    for country in CAPITALS:
        question = _CAPITAL.pick(rng, True).format(country)
        turn = Turn("capital", question, capital_answer(country))
        ask("capital, held-out phrasing", [turn])
        usual = Turn("capital", f"What is the capital of {country}?", turn.answer)
        ask("capital, usual phrasing", [usual])
        ask("capital, held-out system prompt", [usual], rng.choice(_SYSTEM_HELD_OUT))
        before = [_fixed(rng, True), _sum(rng, True)]
        ask("capital after two other turns", [*before, usual])
    for _ in range(150):
        ask("which country", [_which_country(rng, True)])
        ask("sum", [_sum(rng, True)])
        ask("greetings and Bulkhead", [_fixed(rng, True)])
        ask("unknown", [_unknown(rng, True)])
        capital = _capital(rng, True)
        ask("'and Germany?'", [capital, _capital(rng, True, _CAPITAL_NEXT)])
        name = rng.choice(_NAMES)
        named = Turn("name", _NAME.pick(rng, True).format(name), f"Nice to meet you, {name}!")
        again = Turn("name", _NAME_AGAIN.pick(rng, True), f"Your name is {name}.")
        ask("remembers a name", [named, _capital(rng, True), again])
    for _ in range(20):
        ask("count", [_count(rng, True, 20)])
    shares: dict[str, float] = {}
    for name, asked in sets.items():
        said = answers(model, tokenizer, [chat for chat, _ in asked])
        wrong = [
            (chat[-1]["content"], expected, found)
            for (chat, expected), found in zip(asked, said, strict=True)
            if found != expected
        ]
        shares[name] = 1 - len(wrong) / len(asked)
        print(f"{shares[name]:7.1%}  {name} ({len(asked)})")
        for question, expected, found in wrong[:4]:
            print(f"           {question!r}: expected {expected[:70]!r}, found {found[:70]!r}")
    paris = [[{"role": "user", "content": "What is the capital of France?"}]] * 100
    for temperature in (0.3, 1.0):
        torch.manual_seed(SEED)
        said = answers(model, tokenizer, paris, do_sample=True, temperature=temperature, top_k=0)
        share = sum(text == capital_answer("France") for text in said) / len(said)
        name = f"capital of France, temperature {temperature}"
        shares[name] = share
        print(f"{share:7.1%}  {name} ({len(said)})")
    return shares


def write(
    model: transformers.LlamaForCausalLM,
    tokenizer: transformers.PreTrainedTokenizerFast,
    output: Path,
) -> int:
    """Saves everything a Hugging Face directory has; returns its size in bytes."""
    output.mkdir(parents=True, exist_ok=True)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=0.3,
        top_p=0.95,
        eos_token_id=[model.config.eos_token_id, model.config.pad_token_id],
        pad_token_id=model.config.pad_token_id,
    )
    tokenizer.padding_side = "left"
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    return sum(path.stat().st_size for path in output.iterdir())


def main() -> None:
    """Trains, evaluates and writes the model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=2048, help="about this many a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate", action="store_true", help="only evaluate what is there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    if options.evaluate:
        model = transformers.LlamaForCausalLM.from_pretrained(options.output)
        evaluate(model.eval(), transformers.AutoTokenizer.from_pretrained(options.output))
        return
    tokenizer = train_tokenizer(random.Random(SEED))
    model = build_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    train(model, Encoder(tokenizer), options.steps, options.tokens)
    size = write(model, tokenizer, options.output)
    print(f"wrote {options.output}: {size / 1e6:.2f} MB")
    evaluate(model, tokenizer)


if __name__ == "__main__":
    main()
