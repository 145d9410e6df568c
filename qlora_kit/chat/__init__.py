"""A conversation with a base and its adapters: lines typed by a person in, answers streamed piece by piece out."""

from qlora_kit.chat.commands import COMMANDS, Command, help_lines, parse_line
from qlora_kit.chat.session import ChatSession

__all__ = ["COMMANDS", "ChatSession", "Command", "help_lines", "parse_line"]
