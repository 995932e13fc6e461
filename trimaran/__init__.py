"""The front door of Trimaran: the command, the menu, the demo. Thin: it wires and prints."""

__version__ = "0.1.0"
