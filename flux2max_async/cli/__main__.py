"""`python -m flux2max_async.cli`: the command `flux2max`."""

from flux2max_async.cli import main

main()
