"""python -m lit_llm"""

from lit_llm.cli import main

main()
