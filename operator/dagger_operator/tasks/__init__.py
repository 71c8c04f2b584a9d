"""What agents work on: task sources, how rounds deal them out, and grading."""
