"""Conversion between the contract's messages and the domain; decides nothing."""
