"""python -m fastgpt"""

from .cli import main

main()
