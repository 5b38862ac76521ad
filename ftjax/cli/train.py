"""Fine-tune."""

from ftjax.cli import config as configs


def define_flags(flags, argv):
    configs.define(flags, argv)


def main(flags):
    print(flags.config)
