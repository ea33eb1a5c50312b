// jinja-budget.h: chat templates come with strangers' files, and llama.cpp's Jinja engine has no limits of its own:
// {{ 'a' * 10000000000 }}, a loop over range(1000000000) or a macro that calls itself takes all memory, all time or the
// stack. Here the nodes of a parsed template that can do so are replaced by ones that look at a budget first.
#pragma once

#include <string>

struct common_chat_templates;

// Parse a template and run upstream's analysis of it under a budget of its own; std::runtime_error with the reason.
void jinja_check(const std::string & source);

// From now on the programs of these templates stay within the budget of the thread's jinja_running.
void jinja_bound(common_chat_templates * templates);

// The budget of what this thread renders while the object lives.
class jinja_running {
public:
    jinja_running();
    ~jinja_running();
    jinja_running(const jinja_running &)             = delete;
    jinja_running & operator=(const jinja_running &) = delete;

    // Throws if the budget was used up, also where upstream swallowed the exception.
    void check() const;
};
