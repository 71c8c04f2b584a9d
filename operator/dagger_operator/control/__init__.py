"""The round state machine as a pure function: what should exist, given what is observed."""
