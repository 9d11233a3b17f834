"""`python -m lorank` is the command `lorank`."""

from lorank.cli.main import main

main()
