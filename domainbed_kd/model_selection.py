"""DomainBed's rules of model selection, under the name that its users import."""

from domainbed_kd.results.selection import *  # noqa: F403
