"""Puts this folder on the path: tiny.py is imported by its plain name, as IMPORTS of the configs of tests does in other processes."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
