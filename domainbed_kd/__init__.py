"""Knowledge distillation for domain generalization, in DomainBed's Algorithm interface."""

__version__ = "0.1.0"
