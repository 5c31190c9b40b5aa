"""All-to-all managers: how a group's layers reach the exchange of tokens that they use."""
