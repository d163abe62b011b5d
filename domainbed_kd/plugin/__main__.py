"""Runs `python -m domainbed_kd.plugin`."""

from domainbed_kd.console import run_main
from domainbed_kd.plugin import main

run_main(main)
