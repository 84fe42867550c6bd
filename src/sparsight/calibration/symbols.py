"""The elements of scenes: symbols with plain English names, colours and patterns."""

from __future__ import annotations

# Characters that DejaVu Sans can draw and that stay distinct from one another at 20 pixels.
CHARACTERS: dict[str, str] = {
    "sun": "☀", "cloud": "☁", "umbrella": "☂", "snowman": "☃", "comet": "☄", "star": "★",
    "phone": "☎", "clover": "☘", "skull": "☠", "radiation": "☢", "biohazard": "☣", "ankh": "☥",
    "crescent": "☪", "peace": "☮", "yinyang": "☯", "wheel": "☸", "frown": "☹", "smile": "☻",
    "king": "♚", "queen": "♛", "rook": "♜", "bishop": "♝", "knight": "♞", "pawn": "♟",
    "spade": "♠", "club": "♣", "heart": "♥", "diamond": "♦", "steam": "♨", "music": "♫",
    "recycle": "♻", "infinity": "♾", "chair": "♿", "dice": "⚄", "flag": "⚑", "hammer": "⚒",
    "anchor": "⚓", "swords": "⚔", "scales": "⚖", "flask": "⚗", "gear": "⚙", "atom": "⚛",
    "lily": "⚜", "warning": "⚠", "lightning": "⚡", "coffin": "⚰", "urn": "⚱", "scissors": "✂",
    "plane": "✈", "envelope": "✉", "hand": "✌", "pencil": "✏", "pen": "✒", "check": "✔",
    "cross": "✖", "hexagram": "✡", "flower": "✿", "snowflake": "❄", "mouse": "🐭", "cow": "🐮",
    "cat": "🐱", "monkey": "🐵", "arrow": "➤", "domino": "🁃", "house": "⌂", "joker": "🃏",
}  # fmt: skip
SYMBOLS: tuple[str, ...] = tuple(CHARACTERS)

COLOUR_VALUES: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 32),
    "yellow": (250, 215, 40),
    "green": (50, 150, 60),
    "teal": (20, 165, 165),
    "blue": (40, 80, 205),
    "purple": (125, 50, 165),
    "pink": (245, 140, 185),
    "brown": (115, 70, 35),
    "black": (25, 25, 25),
    "grey": (140, 140, 140),
    "white": (245, 245, 245),
}
COLOURS: tuple[str, ...] = tuple(COLOUR_VALUES)
PATTERNS: tuple[str, ...] = ("plain", "striped", "checkered", "dotted")
