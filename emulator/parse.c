/* PTX text -> struct program.
 *
 * Knows as much of the language as NVRTC writes for one kernel: directives, one instruction per
 * statement, registers, constants, vectors and addresses. What an instruction takes is in the
 * opcode tables; what is in none of them is refused by name. */
#include "emulator.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME_SIZE 128

/* .reg .b32 %r<9>: names %r0 ... %r8. A count of 0: the one name alone. */
struct registers {
    char prefix[NAME_SIZE];
    int count;
    char letter; /* p, b, h, w, d as in opcode.operands */
    uint32_t slot;
    int depth; /* of the braces that it lives in */
};

/* A shared variable or a parameter: its address. */
struct symbol {
    char name[NAME_SIZE];
    uint64_t value;
    uint32_t alignment;
    bool is_dynamic; /* extern .shared: comes after all others */
};

/* A label is known within the braces that it stands in. */
struct label {
    char name[NAME_SIZE];
    int target, depth;
};

/* A branch whose label has not been seen; labels of its own depth or less may still come. */
struct jump {
    const char *label;
    int instruction, depth;
};

#define GROWING(type, name)                                                                        \
    type *name;                                                                                    \
    int name##_count, name##_capacity

struct parser {
    char *at; /* what comes next */
    int line;
    int depth; /* of braces: 1 in the kernel's body */
    struct program *program;
    GROWING(struct registers, registers);
    GROWING(struct symbol, symbols);
    GROWING(struct label, labels);
    GROWING(struct jump, jumps);
    GROWING(struct instruction, code);
    GROWING(struct preset, presets);
    GROWING(struct source, sources);
    GROWING(const struct opcode *, opcodes); /* a hash table by name */
    char *message;
    size_t message_size;
};

/* Room for one more element at the end of a growing array; NULL: out of memory. */
static void *grow(void **array, int *count, int *capacity, size_t size)
{
    if (*count == *capacity) {
        const int larger = *capacity ? 2 * *capacity : 64;
        void *moved = realloc(*array, (size_t)larger * size);
        if (!moved)
            return NULL;
        *array = moved;
        *capacity = larger;
    }
    char *element = (char *)*array + (size_t)(*count)++ * size;
    memset(element, 0, size);
    return element;
}

#define GROW(parser, name)                                                                         \
    grow((void **)&(parser)->name, &(parser)->name##_count, &(parser)->name##_capacity,            \
         sizeof *(parser)->name)

__attribute__((format(printf, 2, 3))) static bool refuse(struct parser *parser, const char *format,
                                                         ...)
{
    const int length =
        snprintf(parser->message, parser->message_size, "PTX line %d: ", parser->line);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(parser->message + length, parser->message_size - (size_t)length, format, arguments);
    va_end(arguments);
    return false;
}

/* ---- text ----------------------------------------------------------------------------------- */

static void skip_space(struct parser *parser)
{
    for (;; parser->at++) {
        if (parser->at[0] == '/' && parser->at[1] == '/')
            parser->at += strcspn(parser->at, "\n");
        if (*parser->at == '\n')
            parser->line++;
        if (!isspace((unsigned char)*parser->at))
            return;
    }
}

static bool is_name_character(char c)
{
    return isalnum((unsigned char)c) || c == '_' || c == '$' || c == '%';
}

/* The name at `*at`, which moves behind it and the space that follows. */
static void take_name(char **at, char name[NAME_SIZE])
{
    size_t length = 0;
    for (; is_name_character(**at); (*at)++)
        if (length + 1 < NAME_SIZE)
            name[length++] = **at;
    name[length] = 0;
    *at += strspn(*at, " \t");
}

static bool take(char **at, char expected)
{
    *at += strspn(*at, " \t\n");
    if (**at != expected)
        return false;
    ++*at;
    *at += strspn(*at, " \t\n");
    return true;
}

/* Cuts off what is before `end`, and goes on behind it. NULL: there is none. */
static char *take_until(struct parser *parser, char end)
{
    char *start = parser->at, *stop = strchr(start, end);
    if (!stop)
        return NULL;
    *stop = 0;
    for (const char *c = start; c < stop; c++)
        parser->line += *c == '\n';
    parser->line += end == '\n';
    parser->at = stop + 1;
    return start;
}

/* An integer, or 0fXXXXXXXX (0dXXXXXXXXXXXXXXXX): the bits of a float (a double). */
static bool take_number(char **at, uint64_t *value)
{
    char *end;
    const bool is_float = **at == '0' && strchr("fFdD", (*at)[1]) && (*at)[1];
    if (!isdigit((unsigned char)**at) && **at != '-')
        return false;
    *value = is_float ? strtoull(*at + 2, &end, 16) : strtoull(*at, &end, 0);
    if (end == *at)
        return false;
    end += !is_float && *end == 'U';
    *at = end + strspn(end, " \t");
    return true;
}

/* ---- slots ---------------------------------------------------------------------------------- */

static uint32_t take_slots(struct parser *parser, char letter, int count)
{
    const uint32_t slot = parser->program->slots;
    parser->program->slots += (uint32_t)count * (letter == 'd' ? 2 : 1);
    return slot;
}

static bool add_preset(struct parser *parser, enum special special, uint64_t value, char letter,
                       uint32_t *slot)
{
    const bool is_wide = letter == 'd';
    for (int i = 0; i < parser->presets_count; i++) {
        const struct preset *preset = &parser->presets[i];
        if (preset->special == special && preset->value == value && preset->is_wide == is_wide) {
            *slot = preset->slot;
            return true;
        }
    }
    struct preset *preset = GROW(parser, presets);
    if (!preset)
        return refuse(parser, "out of memory");
    *slot = take_slots(parser, letter, 1);
    *preset = (struct preset){special, *slot, value, is_wide};
    return true;
}

static bool add_constant(struct parser *parser, uint64_t value, char letter, uint32_t *slot)
{
    switch (letter) {
    case 'p': value = value ? ALL_LANES : 0; break; /* a predicate is a set of lanes */
    case 'b': value &= 0xff; break;
    case 'h': value &= 0xffff; break;
    case 'w': value &= 0xffffffff; break;
    }
    return add_preset(parser, CONSTANT, value, letter, slot);
}

static const struct {
    const char *name;
    enum special special;
} SPECIAL_REGISTERS[] = {
    {"%tid.x", TID_X},       {"%tid.y", TID_Y},       {"%tid.z", TID_Z},
    {"%ntid.x", NTID_X},     {"%ntid.y", NTID_Y},     {"%ntid.z", NTID_Z},
    {"%ctaid.x", CTAID_X},   {"%ctaid.y", CTAID_Y},   {"%ctaid.z", CTAID_Z},
    {"%nctaid.x", NCTAID_X}, {"%nctaid.y", NCTAID_Y}, {"%nctaid.z", NCTAID_Z},
    {"%laneid", LANEID},     {"%warpid", WARPID},     {"%lanemask_lt", LANEMASK_LT},
};

static const struct registers *find_register(const struct parser *parser, const char *name,
                                             int *number)
{
    for (int i = parser->registers_count - 1; i >= 0; i--) {
        const struct registers *r = &parser->registers[i];
        const size_t length = strlen(r->prefix);
        *number = 0;
        if (strncmp(name, r->prefix, length) != 0)
            continue;
        if (r->count == 0 ? name[length] == 0 : isdigit((unsigned char)name[length])) {
            char *end = (char *)name + length;
            if (r->count > 0)
                *number = (int)strtol(name + length, &end, 10);
            if (*end == 0 && *number < (r->count ? r->count : 1))
                return r;
        }
    }
    return NULL;
}

static bool find_symbol(const struct parser *parser, const char *name, uint64_t *value)
{
    for (int i = 0; i < parser->symbols_count; i++)
        if (strcmp(parser->symbols[i].name, name) == 0) {
            *value = parser->symbols[i].value;
            return true;
        }
    return false;
}

/* ---- operands ------------------------------------------------------------------------------- */

/* A register, special register, symbol or constant of the width that `letter` names. */
static bool read_value(struct parser *parser, char **at, char letter, struct operand *operand)
{
    char name[NAME_SIZE];
    uint64_t value;
    const char kind = (char)tolower((unsigned char)letter);
    operand->is_dest = kind != letter;
    operand->is_source = !operand->is_dest;
    operand->is_wide = kind == 'd';
    if (operand->is_source && take_number(at, &value))
        return add_constant(parser, value, kind, &operand->slot);
    char *start = *at;
    take_name(at, name);
    for (size_t i = 0;
         operand->is_source && i < sizeof SPECIAL_REGISTERS / sizeof *SPECIAL_REGISTERS; i++) {
        const size_t length = strlen(SPECIAL_REGISTERS[i].name);
        if (strncmp(start, SPECIAL_REGISTERS[i].name, length) == 0 &&
            !is_name_character(start[length])) {
            *at = start + length;
            return kind == 'w' &&
                   add_preset(parser, SPECIAL_REGISTERS[i].special, 0, kind, &operand->slot);
        }
    }
    if (operand->is_dest && strcmp(name, "_") == 0) {
        operand->slot = take_slots(parser, kind, 1);
        return true;
    }
    int number;
    const struct registers *r = find_register(parser, name, &number);
    if (r && r->letter == kind) {
        operand->slot = r->slot + (uint32_t)number * (kind == 'd' ? 2 : 1);
        return true;
    }
    if (operand->is_source && find_symbol(parser, name, &value))
        return add_constant(parser, value, kind, &operand->slot);
    return false;
}

/* [register + constant], [symbol + constant], without the closing bracket. */
static bool read_address(struct parser *parser, char **at, struct operand *operand)
{
    char *start = *at;
    if (!read_value(parser, at, 'd', operand)) {
        *at = start;
        if (!read_value(parser, at, 'w', operand))
            return false;
    }
    uint64_t offset;
    if (take(at, '+')) {
        if (!take_number(at, &offset))
            return false;
        operand->offset = (int64_t)offset;
    }
    return true;
}

/* One item of opcode.operands, at `*item`, which moves on to the next. */
static bool read_item(struct parser *parser, char **at, const char **item, struct instruction *in)
{
    const char letter = *(*item)++;
    struct operand *operand = &in->operand[in->count];
    uint64_t value;
    if (letter == 'i') {
        in->count++;
        if (!take_number(at, &value))
            return false;
        operand->offset = (int64_t)value;
        return true;
    }
    const bool is_address = letter == '[';
    if (is_address) {
        in->count++;
        if (!take(at, '[') || !read_address(parser, at, operand))
            return false;
        if (**item != 'w')
            return take(at, ']');
        if (!take(at, ','))
            return false;
    }
    const char kind = is_address ? *(*item)++ : letter;
    const int length = isdigit((unsigned char)**item) ? *(*item)++ - '0' : 0;
    if (length && !take(at, '{'))
        return false;
    for (int i = 0; i < (length ? length : 1); i++)
        if ((i > 0 && !take(at, ',')) || !read_value(parser, at, kind, &in->operand[in->count++]))
            return false;
    if (length && !take(at, '}'))
        return false;
    return !is_address || take(at, ']');
}

/* All operands of an instruction against a row's items. */
static bool read_operands(struct parser *parser, char *at, const char *items,
                          struct instruction *in)
{
    in->count = 0;
    for (const char *item = items; *item;) {
        if (!read_item(parser, &at, &item, in))
            return false;
        if (*item == ' ' || *item == '|') {
            const char separator = *item++ == '|' ? '|' : ',';
            if (!take(&at, separator))
                return false;
        }
    }
    return *at == 0;
}

/* ---- instructions --------------------------------------------------------------------------- */

static const struct opcode *const TABLES[] = {
    CONTROL_OPCODES, ARITHMETIC_OPCODES, LANE_OPCODES,    MMA_OPCODES,  MATRIX_OPCODES,
    MEMORY_OPCODES,  COPY_OPCODES,       BARRIER_OPCODES, BULK_OPCODES,
};

static uint32_t hash_name(const char *name)
{
    uint32_t hash = 0x811c9dc5u; /* FNV-1a */
    for (; *name; name++)
        hash = (hash ^ (unsigned char)*name) * 0x01000193u;
    return hash;
}

/* Fills the hash table: rows of one name follow each other's places. */
static bool index_opcodes(struct parser *parser)
{
    int rows = 0;
    for (size_t t = 0; t < sizeof TABLES / sizeof *TABLES; t++)
        for (const struct opcode *row = TABLES[t]; row->name; row++)
            rows++;
    for (parser->opcodes_capacity = 64; parser->opcodes_capacity < 2 * rows;)
        parser->opcodes_capacity *= 2;
    parser->opcodes = calloc((size_t)parser->opcodes_capacity, sizeof *parser->opcodes);
    if (!parser->opcodes)
        return refuse(parser, "out of memory");
    const uint32_t mask = (uint32_t)parser->opcodes_capacity - 1;
    for (size_t t = 0; t < sizeof TABLES / sizeof *TABLES; t++)
        for (const struct opcode *row = TABLES[t]; row->name; row++) {
            uint32_t i = hash_name(row->name) & mask;
            while (parser->opcodes[i])
                i = (i + 1) & mask;
            parser->opcodes[i] = row;
        }
    return true;
}

/* The newest instruction is a branch. */
static bool add_jump(struct parser *parser, const char *label)
{
    struct jump *jump = GROW(parser, jumps);
    if (!jump)
        return refuse(parser, "out of memory");
    *jump = (struct jump){label, parser->code_count - 1, parser->depth};
    return true;
}

static bool read_opcode(struct parser *parser, const char *name, char *operands,
                        struct instruction *in)
{
    const uint32_t mask = (uint32_t)parser->opcodes_capacity - 1;
    bool is_known = false;
    for (uint32_t i = hash_name(name) & mask; parser->opcodes[i]; i = (i + 1) & mask) {
        if (strcmp(parser->opcodes[i]->name, name) != 0)
            continue;
        is_known = true;
        in->opcode = parser->opcodes[i];
        if (strchr(in->opcode->operands, 'l'))
            return add_jump(parser, operands);
        if (read_operands(parser, operands, in->opcode->operands, in))
            return true;
    }
    return refuse(parser, is_known ? "unknown operands: %s %s" : "unknown instruction %s %s", name,
                  operands);
}

static bool read_guard(struct parser *parser, char **at, struct instruction *in)
{
    struct operand guard = {0};
    in->guard = -1;
    if (!take(at, '@'))
        return true;
    in->guard_negated = take(at, '!');
    if (!read_value(parser, at, 'p', &guard))
        return refuse(parser, "unknown predicate: %s", *at);
    in->guard = (int)guard.slot;
    return true;
}

static bool read_instruction(struct parser *parser)
{
    struct instruction *in = GROW(parser, code);
    if (!in)
        return refuse(parser, "out of memory");
    in->line = parser->line;
    in->source = parser->sources_count - 1;
    in->text = take_until(parser, ';');
    if (!in->text)
        return refuse(parser, "a statement has no end");
    char *at = (char *)in->text, name[NAME_SIZE];
    for (char *c = at; *c; c++)
        *c = isspace((unsigned char)*c) ? ' ' : *c;
    if (!read_guard(parser, &at, in))
        return false;
    const size_t length = strcspn(at, " \t\n");
    if (length >= sizeof name)
        return refuse(parser, "unknown instruction %s", at);
    memcpy(name, at, length);
    name[length] = 0;
    at += length + strspn(at + length, " \t\n");
    for (size_t end = strlen(at); end > 0 && isspace((unsigned char)at[end - 1]);)
        at[--end] = 0;
    in->converges = strstr(name, ".sync") || strncmp(name, "bar.", 4) == 0;
    const int next_line = parser->line;
    parser->line = in->line; /* for what may be said of it */
    const bool ok = read_opcode(parser, name, at, in);
    parser->line = ok ? next_line : parser->line;
    return ok;
}

/* ---- directives ----------------------------------------------------------------------------- */

static bool starts_with(const char *text, const char *word)
{
    const size_t length = strlen(word);
    return strncmp(text, word, length) == 0 && !is_name_character(text[length]) &&
           text[length] != '.';
}

/* Size in bytes of a type; its register's letter in *letter, 0: none. */
static uint32_t read_type(const char *type, char *letter)
{
    const int bits = atoi(type + strcspn(type, "0123456789"));
    *letter = starts_with(type, ".pred") ? 'p'
              : bits == 64               ? 'd'
              : bits == 32               ? 'w'
              : bits == 16               ? 'h'
              : bits == 8                ? 'b'
                                         : 0;
    return (uint32_t)bits / 8;
}

/* .reg .b32 %r<9>, %x; */
static bool read_registers(struct parser *parser, char *at)
{
    char letter, name[NAME_SIZE];
    at += strspn(at, " \t");
    read_type(at, &letter);
    at += strcspn(at, " \t");
    do {
        struct registers *r = GROW(parser, registers);
        if (!r)
            return refuse(parser, "out of memory");
        at += strspn(at, " \t\n");
        take_name(&at, name);
        memcpy(r->prefix, name, sizeof name);
        if (take(&at, '<'))
            r->count = (int)strtol(at, &at, 10);
        r->letter = letter;
        r->depth = parser->depth;
        if (!letter || !name[0] || (r->count && !take(&at, '>')))
            return refuse(parser, "unknown registers");
        r->slot = take_slots(parser, letter, r->count ? r->count : 1);
    } while (take(&at, ','));
    return *at == 0 || refuse(parser, "unknown registers");
}

static uint32_t align_up(uint32_t x, uint32_t alignment)
{
    return (x + alignment - 1) / alignment * alignment;
}

/* [.align 8] .b8 name[16] or .u64 name: a symbol of so many bytes, aligned, at the end of
 * `space`. */
static bool read_variable(struct parser *parser, char *at, uint32_t *space, uint32_t base,
                          uint32_t *offset, uint32_t *size)
{
    uint32_t alignment = 0, count = 1;
    char letter;
    at += strspn(at, " \t\n");
    if (starts_with(at, ".align"))
        alignment = (uint32_t)strtoul(at + 6, &at, 10);
    at += strspn(at, " \t\n");
    const uint32_t bytes = read_type(at, &letter);
    at += strcspn(at, " \t\n");
    /* .ptr .global .align 16: what a parameter points to. */
    for (at += strspn(at, " \t\n"); *at == '.' || isdigit((unsigned char)*at);)
        at += strcspn(at, " \t\n"), at += strspn(at, " \t\n");
    struct symbol *symbol = GROW(parser, symbols);
    if (!symbol)
        return refuse(parser, "out of memory");
    take_name(&at, symbol->name);
    if (take(&at, '[')) {
        count = (uint32_t)strtoul(at, &at, 10);
        take(&at, ']');
    }
    if (!bytes || !symbol->name[0] || *at)
        return refuse(parser, "unknown variable: %s", at);
    symbol->alignment = alignment ? alignment : bytes;
    *offset = align_up(*space, symbol->alignment);
    *size = bytes * count;
    *space = *offset + *size;
    symbol->value = base + *offset;
    return true;
}

/* Dynamic shared memory, of no size here, starts where the last static variable ends. */
static bool read_shared_variable(struct parser *parser, char *at)
{
    struct program *program = parser->program;
    uint32_t offset, size;
    if (!read_variable(parser, at, &program->shared_bytes, SHARED_BASE, &offset, &size))
        return false;
    parser->symbols[parser->symbols_count - 1].is_dynamic = size == 0;
    for (int i = 0; i < parser->symbols_count; i++) {
        struct symbol *symbol = &parser->symbols[i];
        if (!symbol->is_dynamic)
            continue;
        if (parser->code_count > 0)
            return refuse(parser, "a shared variable after the first instruction");
        program->shared_bytes = align_up(program->shared_bytes, symbol->alignment);
        symbol->value = SHARED_BASE + program->shared_bytes;
    }
    return true;
}

/* .entry name( .param ..., .param ... ) up to the brace of the body */
static bool read_entry(struct parser *parser)
{
    struct program *program = parser->program;
    char name[NAME_SIZE];
    take_name(&parser->at, name);
    if (program->name[0] || strlen(name) >= sizeof program->name)
        return refuse(parser, "a module has one kernel, and %s is another", name);
    strcpy(program->name, name);
    char *parameters = take(&parser->at, '(') ? take_until(parser, ')') : NULL;
    for (char *at = parameters; at && *at;) {
        at += strspn(at, " \t\n");
        if (!starts_with(at, ".param"))
            break;
        char *end = at + strcspn(at, ",");
        char *next = *end ? end + 1 : end;
        while (end > at && isspace((unsigned char)end[-1]))
            end--;
        *end = 0;
        const int i = program->param_count++;
        if (i == MAX_PARAMS)
            return refuse(parser, "more than %d parameters", MAX_PARAMS);
        if (!read_variable(parser, at + 6, &program->param_bytes, 0, &program->param_offset[i],
                           &program->param_size[i]))
            return false;
        at = next;
    }
    return parameters || refuse(parser, "a kernel without parameters in parentheses");
}

/* .loc file line column[, function_name label, inlined_at file line column] */
static bool read_location(struct parser *parser, const char *at)
{
    struct source *source = GROW(parser, sources);
    if (!source)
        return refuse(parser, "out of memory");
    const char *inlined = strstr(at, "inlined_at");
    if (sscanf(at, "%d %d", &source->file, &source->line) != 2 ||
        (inlined && sscanf(inlined + 10, "%d %d", &source->caller_file, &source->caller_line) != 2))
        return refuse(parser, "unknown .loc");
    return true;
}

/* .file 1 "folder/name", wherever it stands: NVRTC writes them behind the kernel. */
static void read_files(struct program *program)
{
    for (const char *at = program->text; (at = strstr(at, ".file")); at++) {
        int number;
        char path[512];
        if (sscanf(at, ".file %d \"%511[^\"]", &number, path) != 2 || number < 0 ||
            number >= MAX_FILES)
            continue;
        const char *folder = strrchr(path, '/');
        snprintf(program->files[number], sizeof program->files[number], "%.63s",
                 folder ? folder + 1 : path);
    }
}

/* A directive at parser->at, its dot included. */
static bool read_directive(struct parser *parser)
{
    char *at = parser->at;
    const size_t length = 1 + strspn(at + 1, "abcdefghijklmnopqrstuvwxyz_");
    char word[32] = "";
    if (length < sizeof word)
        memcpy(word, at, length);
    parser->at += length;
    const bool is_line = strstr(" .version .target .address_size .file .loc .maxntid .minnctapersm "
                                ".maxnreg .reqntid ",
                                word) != NULL;
    if (strcmp(word, ".visible") == 0 || strcmp(word, ".extern") == 0 || strcmp(word, ".weak") == 0)
        return true;
    if (strcmp(word, ".entry") == 0) {
        skip_space(parser);
        return read_entry(parser);
    }
    char *rest = take_until(parser, is_line ? '\n' : ';');
    if (!rest)
        return refuse(parser, "a directive has no end");
    if (strcmp(word, ".reg") == 0)
        return read_registers(parser, rest);
    if (strcmp(word, ".shared") == 0)
        return read_shared_variable(parser, rest);
    if (strcmp(word, ".loc") == 0)
        return read_location(parser, rest);
    if (strcmp(word, ".maxntid") == 0 || strcmp(word, ".reqntid") == 0)
        parser->program->max_threads = (uint32_t)strtoul(rest, NULL, 10);
    /* Constants of the module are compiled in: a kernel that names one meets an unknown symbol. */
    return is_line || strcmp(word, ".global") == 0 || strcmp(word, ".pragma") == 0 ||
           refuse(parser, "unknown directive %s", word);
}

/* ---- the module ----------------------------------------------------------------------------- */

static const struct label *find_label(const struct parser *parser, const struct jump *jump)
{
    for (int i = 0; i < parser->labels_count; i++)
        if (parser->labels[i].depth == jump->depth &&
            strcmp(parser->labels[i].name, jump->label) == 0)
            return &parser->labels[i];
    return NULL;
}

static bool refuse_label(struct parser *parser, const struct jump *jump)
{
    parser->line = parser->code[jump->instruction].line;
    return refuse(parser, "unknown label %s", jump->label);
}

/* A scope closes: all its labels are known, and what its branches still lack is outside. */
static bool close_scope(struct parser *parser)
{
    int open = 0;
    for (int i = 0; i < parser->jumps_count; i++) {
        struct jump jump = parser->jumps[i];
        const struct label *label = find_label(parser, &jump);
        if (jump.depth == parser->depth && label) {
            parser->code[jump.instruction].target = label->target;
            continue;
        }
        if (jump.depth == parser->depth && --jump.depth == 0)
            return refuse_label(parser, &jump);
        parser->jumps[open++] = jump;
    }
    parser->jumps_count = open;
    while (parser->labels_count > 0 &&
           parser->labels[parser->labels_count - 1].depth == parser->depth)
        parser->labels_count--;
    while (parser->registers_count > 0 &&
           parser->registers[parser->registers_count - 1].depth == parser->depth)
        parser->registers_count--;
    parser->depth--;
    return true;
}

/* The label at parser->at, if there is one. */
static bool read_label(struct parser *parser, bool *is_label)
{
    char *at = parser->at, name[NAME_SIZE];
    take_name(&at, name);
    *is_label = name[0] && *at == ':';
    if (!*is_label)
        return true;
    parser->at = at + 1;
    struct label *label = GROW(parser, labels);
    if (!label)
        return refuse(parser, "out of memory");
    memcpy(label->name, name, sizeof name);
    label->target = parser->code_count;
    label->depth = parser->depth;
    return true;
}

/* One statement; *done after the brace that closes the kernel. */
static bool read_statement(struct parser *parser, bool *done)
{
    bool is_label;
    skip_space(parser);
    switch (*parser->at) {
    case 0: return refuse(parser, "the module ends before a kernel does");
    case '{': parser->at++, parser->depth++; return true;
    case '}':
        parser->at++;
        *done = parser->depth == 1;
        return close_scope(parser);
    case '.': return read_directive(parser);
    case ';': parser->at++; return true;
    }
    if (!read_label(parser, &is_label))
        return false;
    return is_label || read_instruction(parser);
}

static void free_parser(struct parser *parser)
{
    free(parser->registers);
    free(parser->symbols);
    free(parser->labels);
    free(parser->jumps);
    free(parser->opcodes);
}

struct program *parse_program(const char *ptx, char *message, size_t size)
{
    struct program *program = calloc(1, sizeof *program);
    struct parser parser = {.line = 1, .message = message, .message_size = size};
    bool done = false;
    snprintf(message, size, "out of memory");
    if (program)
        program->text = strdup(ptx);
    bool ok = program && program->text;
    if (ok) {
        parser.program = program;
        parser.at = program->text;
        read_files(program);
        ok = index_opcodes(&parser);
    }
    while (ok && !done)
        ok = read_statement(&parser, &done);
    if (program) {
        program->code = parser.code;
        program->length = parser.code_count;
        program->presets = parser.presets;
        program->preset_count = parser.presets_count;
        program->sources = parser.sources;
        program->source_count = parser.sources_count;
    }
    free_parser(&parser);
    if (ok)
        return program;
    free_program(program);
    return NULL;
}

void free_program(struct program *program)
{
    if (!program)
        return;
    free(program->text);
    free(program->code);
    free(program->presets);
    free(program->sources);
    free(program);
}

/* Where the .loc before number `i` says that a line was inlined; itself not inlined: unknown. */
static struct source caller_of(const struct program *program, struct source callee, int i)
{
    while (--i >= 0)
        if (program->sources[i].file == callee.caller_file &&
            program->sources[i].line == callee.caller_line)
            return program->sources[i];
    return (struct source){callee.caller_file, callee.caller_line, 0, 0};
}

void describe_place(const struct program *program, const struct instruction *in, char *text,
                    size_t size)
{
    size_t length = (size_t)snprintf(text, size, "PTX line %d", in->line);
    if (in->source < 0)
        return;
    struct source at = program->sources[in->source];
    for (const char *word = " ("; at.line && length < size; word = ", in ") {
        length += (size_t)snprintf(text + length, size - length, "%s%s:%d", word,
                                   program->files[at.file], at.line);
        at = caller_of(program, at, in->source);
    }
    if (length < size)
        snprintf(text + length, size - length, ")");
}
