"""The interview question, worked through: steps as data, and an experiment for each."""
