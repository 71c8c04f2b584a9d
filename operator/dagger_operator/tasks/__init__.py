"""The agents' tasks: sources, how they are dealt to rounds, and grading."""
