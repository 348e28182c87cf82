# Scores a folder of images on the CPU:
#   docker build -t fusenorm .
#   docker run --rm --user "$(id -u)" -v "$PWD:/work" fusenorm \
#       score --detector detector.safetensors --weights net.pth images --csv judged.csv
FROM python:3.12-slim
COPY . /source
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir '/source[fast,report]' && rm -rf /source
WORKDIR /work
ENV HOME=/tmp NUMBA_CACHE_DIR=/tmp/numba
ENTRYPOINT ["fusenorm"]
CMD ["--help"]
