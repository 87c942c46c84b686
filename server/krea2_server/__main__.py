"""The command krea2-serve, which keeps its own bytecode too: nothing is imported before that."""

from krea2_srt.bytecode import write_bytecode


def main() -> None:
    write_bytecode()
    from krea2_srt.cli.errors import needs_extra

    with needs_extra("krea2-serve", "serve"):
        from krea2_server.cli import main as serve

    serve()


if __name__ == "__main__":
    main()
