"""python -m lit_llm"""

from lit_llm.cli import in_utf8, main

in_utf8()
main()
