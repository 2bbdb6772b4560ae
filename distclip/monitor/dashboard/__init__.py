"""What people look at: a page, pictures for papers, a table in the terminal."""

from .document import write_page
from .overview import overview
from .pictures import write_pictures
from .verdicts import verdicts

__all__ = ["overview", "verdicts", "write_page", "write_pictures"]
