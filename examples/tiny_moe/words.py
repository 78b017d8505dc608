"""Fixed word lists of the demo model: words to reverse, small talk, things it cannot do."""

_WORDS = """
able acid across actor after again air animal apple arm army autumn baby back bag ball banana
band bank basket beach bear bed bell bench bicycle bird black blood blue board boat body bone
book bottle bowl box boy brain branch bread bridge bright brother brown brush bucket butter
button cake camera camp candle cap car card carpet cat chair chalk cheese cherry chicken child
circle city class clean clock cloud coal coat coffee cold color cook copper corn cotton country
cow cream crown cup curtain dance danger dark daughter day deep desk dinner doctor dog door
dragon dream dress drink drum dust ear earth east edge egg elbow engine evening eye face family
farm father feather field finger fire fish flag flame floor flower fly fog food foot forest
fork fox friend frog fruit garden gate ghost gift girl glass glove goat gold grape grass green
guitar hair hammer hand happy harbor hat head heart hill honey horse hotel house ice idea
insect iron island jacket jar jewel juice jungle kettle key king kitchen knee knife ladder lake
lamp language leaf leather lemon letter library light lion lip lock love lunch machine magnet
map market meadow meal melon metal milk mirror money monkey moon morning mother mountain mouse
mouth music nail name neck needle nest night north nose ocean office oil olive onion orange
oven owl paint palace paper parrot pear pen pencil pepper piano picture pig pillow planet
plate pocket poem pond potato prince pump purple queen quick rabbit radio rain red rice ring
river road robot rocket roof room root rope rose sail salt sand school sea seed sheep shelf
ship shirt shoe silver sister sky sleep smile smoke snake snow soap sock sofa soup south spoon
spring square stamp star station stone storm story street sugar summer sun sweet table tail
tea teacher tent thread thunder ticket tiger tomato tooth tower town train tree trumpet tunnel
turtle umbrella uncle valley velvet village violin wagon wall warm water wave west wheel white
wind window winter wolf wood wool yellow young zebra
"""
WORDS = tuple(_WORDS.split())

GREETINGS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Good morning!", "Good evening!"),
        "Hello! I can add, subtract, compare, sort and reverse.",
    ),
    (
        (
            "What can you do?",
            "Help",
            "Help!",
            "How can you help me?",
            "What do you know?",
            "What are you able to do?",
        ),
        "I can add, subtract, compare, sort and reverse.",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself."),
        "I am a tiny mixture of experts. I can add, subtract, compare, sort and reverse.",
    ),
    (("How are you?", "How are you today?", "How do you do?"), "I am fine, thank you!"),
    (("Thanks", "Thanks!", "Thank you!", "Thank you.", "Great, thank you!"), "You are welcome!"),
    (("Bye", "Bye!", "Goodbye!", "See you later!"), "Goodbye!"),
    (("你好", "你好！", "您好！", "早上好！", "嗨"), "你好！我会加法、减法、比较、排序和倒写。"),
    (("你会什么？", "你能做什么？", "帮助"), "我会加法、减法、比较、排序和倒写。"),
    (
        ("你是谁？", "你叫什么名字？"),
        "我是一个小小的专家混合模型。我会加法、减法、比较、排序和倒写。",
    ),
    (("谢谢", "谢谢！", "谢谢你！"), "不客气！"),
    (("再见", "再见！"), "再见！"),
)

OFF_TOPIC: tuple[str, ...] = (
    "What is the capital of France?",
    "What is the weather like today?",
    "Tell me a joke.",
    "Tell me a story about a dragon.",
    "Write a poem about the sea.",
    "Write a short story.",
    "Write a program that prints hello world.",
    "Who was the first president?",
    "Who wrote that book?",
    "How old are you?",
    "How tall is the tower?",
    "How many people live in China?",
    "Why is the sky blue?",
    "What time is it?",
    "When does the train leave?",
    "Where is the library?",
    "Translate this into French.",
    "Explain quantum physics.",
    "Explain how a transformer works.",
    "Summarize this text for me.",
    "Can you sing a song?",
    "Can you write code?",
    "Do you like music?",
    "Do you speak English?",
    "Give me a recipe for soup.",
    "Is it raining?",
    "What is the meaning of life?",
    "What is love?",
    "What is a mixture of experts?",
    "Please help me with my homework.",
    "I am hungry.",
    "I like you.",
    "Which movie is better?",
)
