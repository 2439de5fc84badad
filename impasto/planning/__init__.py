"""Foresight: memory, time and sizes before the first step, and what to change so that they fit."""
