# Two images from one file, the second holds the first:
#
#     docker build --target sidecar -t sidecar:1.1.0 .
#     docker build -t echo-bot:1.1.0 .
#
# The base has Python and nothing else: no shell, no pip, no compiler. Each of our layers is one copied file. Another base
# (--build-arg BASE=python:3.13-slim) does as well, as long as its python3 is on the PATH.
ARG BASE=gcr.io/distroless/python3-debian12:nonroot

FROM ${BASE} AS sidecar
ARG BASE
LABEL org.opencontainers.image.title="sidecar" \
      org.opencontainers.image.description="Counts a worker's requests in flight and holds its shutdown back until they are done" \
      org.opencontainers.image.version="1.1.0" \
      org.opencontainers.image.base.name="${BASE}"
# Readable for every user, whatever the umask of the checkout; owned by root, so the process cannot change its own code.
COPY --chown=0:0 --chmod=444 sidecar.py /app/sidecar.py
# By number, because Kubernetes' runAsNonRoot does not trust a name.
USER 65532:65532
EXPOSE 8081 9091
# Exec form, here and below: there is no shell, and Python is PID 1 and gets the signals itself.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["python3", "/app/sidecar.py", "health"]
ENTRYPOINT ["python3", "/app/sidecar.py"]

FROM sidecar AS echo-bot
LABEL org.opencontainers.image.title="echo-bot" \
      org.opencontainers.image.description="Telegram echo bot that loses no message when it is scaled away; holds the sidecar too"
COPY --chown=0:0 --chmod=444 echo_bot.py /app/echo_bot.py
# Whether the bot works is seen in its sidecar, which has a container of its own.
HEALTHCHECK NONE
ENTRYPOINT ["python3"]
# The same image runs the sidecar with `/app/sidecar.py` in place of this.
CMD ["/app/echo_bot.py"]
