// A trainer that trains nothing, in a millisecond: tests/support/stub_trainer.sh for figures of thousands of jobs, where
// a shell (20 ms of processor time each) would be measured in place of the service.
//
//   cc -O2 -o noop_trainer tests/support/noop_trainer.c        noop_trainer train-child --spec FILE
//
// It reads task_id, attempt, run_dir, result_path and train.data of the specification. `stub:steps=N,pause=S` in the data are
// N steps (default 1) of S seconds (default 0), in which it obeys `stop`, `checkpoint` and the end of its input as the shell does.
// In the run folder it leaves the shell's proofs: `attempts`, `complete`, and `violations` where it ran after completion.
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { COMPLETED = 0, CONFIG = 10, STORAGE = 15, CANCELLED = 130, INTERRUPTED = 131, SPEC_BYTES_MAX = 1 << 20, TEXT_MAX = 4096 };

static char spec[SPEC_BYTES_MAX];
static char task_id[TEXT_MAX], run_dir[TEXT_MAX], result_path[TEXT_MAX], data[TEXT_MAX];
static long attempt, steps = 1, step;
static double pause_s;

// The value of the first `"key":` as text without quotes; ends the program when it is missing or too long.
static void field(const char *key, char *into) {
    char name[64];
    snprintf(name, sizeof name, "\"%s\":", key);
    const char *at = strstr(spec, name);
    if (at == NULL) {
        fprintf(stderr, "no %s in the specification\n", key);
        exit(CONFIG);
    }
    at += strlen(name);
    int quoted = *at == '"';
    size_t length = 0;
    for (at += quoted; *at != 0 && (quoted ? *at != '"' : strchr(",}] \n", *at) == NULL); at++) {
        if (quoted && *at == '\\' && at[1] != 0) at++;
        if (length + 1 >= TEXT_MAX) exit(CONFIG);
        into[length++] = *at;
    }
    into[length] = 0;
}

static double option(const char *name, double otherwise) {
    char key[64];
    snprintf(key, sizeof key, "%s=", name);
    for (const char *at = data; (at = strstr(at, key)) != NULL; at++)
        if (at > data && (at[-1] == ':' || at[-1] == ',')) return strtod(at + strlen(key), NULL);
    return otherwise;
}

static void append(const char *name, const char *text) {
    char path[2 * TEXT_MAX];
    snprintf(path, sizeof path, "%s/%s", run_dir, name);
    FILE *file = fopen(path, "a");
    if (file == NULL || fputs(text, file) < 0 || fclose(file) != 0) exit(STORAGE);
}

static int exists(const char *name) {
    char path[2 * TEXT_MAX];
    snprintf(path, sizeof path, "%s/%s", run_dir, name);
    return access(path, F_OK) == 0;
}

// Whole or not at all.
static void write_result(const char *status, const char *fitness) {
    char temporary[TEXT_MAX + 8];
    snprintf(temporary, sizeof temporary, "%s.tmp", result_path);
    FILE *file = fopen(temporary, "w");
    if (file == NULL) exit(STORAGE);
    fprintf(file,
            "{\"task_id\":\"%s\",\"attempt\":%ld,\"status\":\"%s\",\"fitness\":%s,"
            "\"metrics\":{\"metrics/mAP50(B)\":0.91},\"epochs\":%ld}",
            task_id, attempt, status, fitness, step);
    if (fclose(file) != 0 || rename(temporary, result_path) != 0) exit(STORAGE);
}

static void finish(const char *outcome, int code) {
    printf("{\"event\":\"finished\",\"outcome\":\"%s\",\"metrics\":{\"metrics/mAP50(B)\":0.91},\"fitness\":0.5,\"epochs\":%ld}\n",
           outcome, step);
    fflush(stdout);
    exit(code);
}

static double now_s(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec * 1e-9;
}

// Obeys what comes on standard input within a step's time.
static void listen(void) {
    static char line[256];
    static size_t length;
    double end = now_s() + pause_s;
    for (;;) {
        double left_s = end - now_s();
        struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
        int ready = poll(&input, 1, left_s > 0 ? (int)(left_s * 1e3 + 0.999) : 0);
        if (ready < 0 && errno == EINTR) continue;
        if (ready <= 0) return;
        char letter;
        if (read(STDIN_FILENO, &letter, 1) != 1) exit(INTERRUPTED);
        if (letter != '\n') {
            if (length + 1 < sizeof line) line[length++] = letter;
            continue;
        }
        line[length] = 0;
        length = 0;
        if (strcmp(line, "stop") == 0) {
            write_result("cancelled", "null");
            finish("stopped", CANCELLED);
        }
        if (strcmp(line, "checkpoint") == 0)
            printf("{\"event\":\"checkpoint\",\"path\":\"noop\",\"epoch\":%ld,\"step\":%ld}\n", step, step);
    }
}

int main(int count, char **arguments) {
    // It knows of no GPU.
    if (count > 1 && strcmp(arguments[1], "probe") == 0) return 3;
    if (count != 4 || strcmp(arguments[1], "train-child") != 0 || strcmp(arguments[2], "--spec") != 0) return CONFIG;
    FILE *file = fopen(arguments[3], "r");
    if (file == NULL) return CONFIG;
    size_t length = fread(spec, 1, sizeof spec - 1, file);
    fclose(file);
    spec[length] = 0;
    char number[TEXT_MAX];
    field("task_id", task_id);
    field("attempt", number);
    attempt = strtol(number, NULL, 10);
    field("run_dir", run_dir);
    field("result_path", result_path);
    field("data", data);
    steps = (long)option("steps", 1);
    pause_s = option("pause", 0);

    char line[64];
    snprintf(line, sizeof line, "%ld from 0\n", attempt);
    if (exists("complete")) append("violations", "an attempt after completion\n");
    append("attempts", line);
    printf("{\"event\":\"started\",\"task_id\":\"%s\",\"pid\":%ld}\n", task_id, (long)getpid());
    printf("{\"event\":\"plan\",\"batch\":4,\"batches\":1,\"epochs\":%ld}\n", steps);
    while (step < steps) {
        if (pause_s > 0) {
            fflush(stdout);
            listen();
        }
        step++;
        printf("{\"event\":\"epoch\",\"epoch\":%ld,\"epochs\":%ld,\"columns\":{\"train/box_loss\":1.5},\"fitness\":0.5,\"is_best\":true}\n",
               step, steps);
    }
    write_result("completed", "0.5");
    snprintf(line, sizeof line, "%ld\n", attempt);
    append("complete", line);
    finish("completed", COMPLETED);
}
