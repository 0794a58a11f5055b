"""What the generator of planted faults puts in: openers, refusals, foreign sentences, synonyms. Written for it."""

STOCK_OPENERS = ("Sure!", "Certainly!", "Of course!", "Great question!")

WIDER_OPENERS = (
    "Sure, here you go.", "Sure thing!", "Certainly, I can help with that.", "Of course, happy to help!",
    "That's a great question!", "Absolutely!", "Great question.", "I'd be happy to help!", "Glad to help.",
    "What a wonderful question!", "Happy to help!", "Thanks for asking!", "Good question!", "No problem!",
)  # fmt: skip

REFUSALS = (
    "I'm sorry, but I can't help with that.", "I am sorry, but I cannot assist with this request.",
    "Sorry, I'm not able to provide that information.", "I cannot fulfil this request.", "I can't comply with that.",
    "I'm afraid I can't answer this question.", "Unfortunately, I am unable to help you with that.",
    "I must decline to answer this.", "I won't be able to assist with that.", "I apologize, but I cannot answer that.",
    "I'm unable to provide an answer to this question.", "As much as I'd like to, I cannot help with this.",
)  # fmt: skip

BOILERPLATE = (
    "As an AI language model, I do not have personal opinions, but here is what I can say.",
    "As an AI, I don't have feelings.", "As a large language model, I have no access to the internet.",
    "As an artificial intelligence, I cannot experience this myself.",
    "My knowledge cutoff is September 2021, so newer facts may be missing.",
    "I was trained by OpenAI and my training data ends in 2021.",
    "As of my last knowledge update, this was still the case.", "I'm just an AI assistant, so take this with care.",
    "I am an AI developed by a company and do not have a body.", "Being an AI language model, I can only offer text.",
    "As a language model, I can't browse the web.",
)  # fmt: skip

PLACEHOLDERS = (
    "[Your Name]", "[insert date here]", "<insert example>", "[COMPANY NAME]", "{{customer_name}}",
    "TODO: write this part.", "[TBD]", "Lorem ipsum dolor sit amet, consectetur adipiscing elit.", "[link]",
    "XXX fill in later XXX", "[Placeholder text]", "<your answer here>",
)  # fmt: skip

SLURS_STAND_INS = (
    "grubworm",
    "dunderhead",
    "muckface",
    "snotgoblin",
)  # the word list under test

FOREIGN = {
    "de": (
        "Die Sitzung beginnt am Montag um neun Uhr im großen Saal.", "Wir haben das Ergebnis noch nicht geprüft.",
        "Der Preis hängt davon ab, wie viele Stücke bestellt werden.", "Das ist nicht so einfach, wie es aussieht.",
        "Man sollte vorher mit einer Fachkraft sprechen.", "Die Kinder spielen im Garten, während es regnet.",
        "Ich würde zuerst die Rechnung bezahlen und dann fragen.", "Es gibt drei Gründe, die dafür sprechen.",
    ),
    "fr": (
        "La réunion commence lundi à neuf heures dans la grande salle.", "Nous n'avons pas encore vérifié le résultat.",
        "Le prix dépend du nombre de pièces que vous commandez.", "Ce n'est pas aussi simple que cela en a l'air.",
        "Il vaut mieux parler d'abord avec un spécialiste.", "Les enfants jouent dans le jardin malgré la pluie.",
        "Je paierais d'abord la facture et je demanderais ensuite.", "Il y a trois raisons qui plaident pour cela.",
    ),
    "es": (
        "La reunión empieza el lunes a las nueve en la sala grande.", "Todavía no hemos comprobado el resultado.",
        "El precio depende de cuántas piezas se pidan.", "No es tan fácil como parece a primera vista.",
        "Lo mejor es hablar antes con un especialista.", "Los niños juegan en el jardín aunque llueve.",
        "Yo pagaría primero la factura y luego preguntaría.", "Hay tres razones que hablan a favor de ello.",
    ),
    "it": (
        "La riunione comincia lunedì alle nove nella sala grande.", "Non abbiamo ancora controllato il risultato.",
        "Il prezzo dipende da quanti pezzi si ordinano.", "Non è così semplice come sembra.",
        "È meglio parlare prima con uno specialista.", "I bambini giocano in giardino anche se piove.",
        "Io pagherei prima la fattura e poi chiederei.", "Ci sono tre ragioni che parlano a favore.",
    ),
    "nl": (
        "De vergadering begint maandag om negen uur in de grote zaal.", "We hebben het resultaat nog niet nagekeken.",
        "De prijs hangt af van hoeveel stuks er worden besteld.", "Het is niet zo eenvoudig als het lijkt.",
        "Je kunt beter eerst met een deskundige praten.", "De kinderen spelen in de tuin terwijl het regent.",
        "Ik zou eerst de rekening betalen en daarna vragen.", "Er zijn drie redenen die daarvoor spreken.",
    ),
    "ru": (
        "Собрание начинается в понедельник в девять часов.", "Мы ещё не проверили результат.",
        "Цена зависит от того, сколько штук заказано.", "Это не так просто, как кажется на первый взгляд.",
        "Лучше сначала поговорить со специалистом.", "Дети играют в саду, хотя идёт дождь.",
    ),
    "zh": (
        "会议星期一上午九点在大厅开始。", "我们还没有检查结果。", "价格取决于订购的数量。",
        "这并不像看起来那么简单。", "最好先和专家谈一谈。", "虽然下雨，孩子们还在花园里玩。",
    ),
    "ja": (
        "会議は月曜日の九時に大広間で始まります。", "まだ結果を確認していません。", "値段は数によって変わります。",
        "見かけほど簡単ではありません。", "先に専門家に相談した方がいいです。", "雨でも子供たちは庭で遊んでいます。",
    ),
    "ar": (
        "يبدأ الاجتماع يوم الاثنين في الساعة التاسعة.", "لم نتحقق من النتيجة بعد.", "يعتمد السعر على عدد القطع.",
        "الأمر ليس سهلا كما يبدو.", "من الأفضل التحدث مع خبير أولا.", "يلعب الأطفال في الحديقة رغم المطر.",
    ),
    "hi": (
        "बैठक सोमवार को नौ बजे बड़े कमरे में शुरू होती है।", "हमने अभी तक परिणाम की जाँच नहीं की है।",
        "कीमत इस पर निर्भर करती है कि कितने टुकड़े मँगाए गए हैं।", "यह उतना आसान नहीं है जितना दिखता है।",
        "पहले किसी विशेषज्ञ से बात करना बेहतर है।", "बारिश में भी बच्चे बगीचे में खेलते हैं।",
    ),
}  # fmt: skip

PROMPT_FRAMES = (
    "Could you tell me this: {}", "I would like to know the following. {}", "{} Please explain.", "Question: {}",
    "Help me with this one. {}", "Here is what I am wondering about: {}", "{} Thanks in advance.", "My question is: {}",
)  # fmt: skip

FILLERS = ("In fact, ", "Basically, ", "Well, ", "To be clear, ", "In short, ", "Generally speaking, ", "Then again, ")

_PAIRS = """
big:large large:huge small:little little:small buy:purchase buys:purchases bought:purchased sell:market sells:markets
sold:marketed get:receive gets:receives got:received give:hand gives:hands gave:handed make:produce makes:produces
made:produced many:numerous much:plenty money:cash cost:price costs:runs total:sum altogether:combined start:begin
starts:begins started:began end:finish ends:finishes ended:finished help:assist helps:assists helped:assisted
use:employ uses:employs used:employed need:require needs:requires needed:required want:wish wants:wishes wanted:wished
show:display shows:displays showed:displayed find:locate finds:locates found:located think:reckon thinks:reckons
keep:retain keeps:retains kept:retained each:every every:each also:additionally but:however because:since so:therefore
if:provided when:once about:regarding around:roughly more:extra less:fewer fewer:less than:over before:prior
after:following first:initially last:final day:date days:dates week:fortnight year:annum years:annums children:kids
kids:children child:kid friend:pal friends:pals house:home car:vehicle cars:vehicles job:position work:labour
works:labours worked:laboured company:firm companies:firms business:enterprise people:folks person:individual
problem:issue problems:issues answer:reply question:query good:fine bad:poor great:excellent nice:pleasant
important:vital different:distinct same:identical easy:simple hard:difficult quick:fast slow:sluggish often:frequently
always:constantly never:hardly usually:normally probably:likely maybe:perhaps only:merely just:simply very:extremely
really:truly amount:quantity number:figure numbers:figures part:portion parts:portions half:semi increase:rise
increases:rises decrease:drop pay:spend pays:spends paid:spent earn:gain earns:gains earned:gained save:set
stock:share stocks:shares market:exchange tax:levy taxes:levies income:earnings account:deposit bank:lender
loan:credit invest:put investment:holding risk:danger value:worth rate:pace food:meal eat:consume eats:consumes
ate:consumed drink:sip walk:stroll run:jog road:street city:town town:city school:college student:pupil
students:pupils teacher:tutor book:volume books:volumes write:compose writes:composes wrote:composed read:peruse
say:state says:states said:stated tell:inform tells:informs told:informed ask:enquire asks:enquires asked:enquired
look:glance see:notice sees:notices saw:noticed know:understand knows:understands like:enjoy likes:enjoys love:adore
hours:hrs minutes:mins long:lengthy short:brief old:aged new:fresh begin:start finish:complete leave:depart
leaves:departs left:departed come:arrive comes:arrives came:arrived go:head goes:heads went:headed take:grab
takes:grabs took:grabbed put:place puts:places bring:carry brings:carries brought:carried
"""
SYNONYMS = dict(pair.split(":") for pair in _PAIRS.split())
